"""A training run: where it lives, what it starts from, and whether it goes on from where it stopped.

A run may start in four ways, tried in this order:
1. it is finished: said, and nothing is done;
2. it has a good checkpoint made with the same settings from the same parent, which may be gone: it goes on, exactly;
3. mid, sft and rl: from the weights of the stage before;
4. base: from scratch.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import checkpoint, config, environment, files, run_log
from nanochat_jax.config import GPTConfig, Train, UserError
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, processes, sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.progress import Timer
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import optim
from nanochat_jax.training.step import TrainState, execution, make_step
from nanochat_jax.training.wandb_log import Wandb

# Settings that may differ between a run and its continuation: they do not change what is computed.
FREE = {
    "preset", "run", "model_tag", "resume", "device_type", "device_batch_size", "core_dir", "eval_every",
    "eval_tokens", "save_every", "keep_last", "keep_every", "core_metric_every", "core_metric_max_per_task",
    "sample_every", "eval_metrics_every", "eval_metrics_tasks", "eval_metrics_max_problems", "eval_examples",
    "eval_samples",
    "mesh", "shard", "attention", "remat", "scan_layers", "coordinator", "num_processes", "process_id",
}  # fmt: skip

MEASURED = ("train", "val", "core")  # kinds of records whose last one every checkpoint holds

# From where to where the numbers of a run may be; NaN is nowhere between.
LARGEST = sys.float_info.max
BOUNDS = {
    "seed": (0, 2**31 - 1), "keep_last": (1, LARGEST), "num_epochs": (1, LARGEST), "grad_clip": (0, LARGEST),
    "matrix_lr": (0, LARGEST), "embedding_lr": (0, LARGEST), "unembedding_lr": (0, LARGEST),
    "weight_decay": (0, LARGEST), "init_lr_frac": (0, LARGEST), "final_lr_frac": (0, LARGEST),
    "warmup_ratio": (0, 1), "warmdown_ratio": (0, 1),
}  # fmt: skip

# What to do about a run that is another one than is asked for.
INSTEAD = "choose another --model_tag, or move the run aside with --resume=never"


@dataclass
class Run:
    cfg: Train
    dir: Path
    model_cfg: GPTConfig
    tokenizer: Tokenizer
    layout: Layout
    dtype: jnp.dtype
    optimizer: optax.GradientTransformation
    state: TrainState
    saver: checkpoint.Saver
    held: ExitStack  # the run's lock
    step: int  # the one to do next
    data: dict | None  # position of the data pipeline, when resumed
    totals: dict  # seconds, tokens and FLOPs spent so far
    identity: dict  # what a continuation must agree with
    metrics: dict  # what was logged last of each of MEASURED
    wandb: Wandb | None = None  # of process 0, from `begin` on

    def begin(self) -> None:
        """Once nothing can be refused any more: makes the folder that of this run, and logs its start."""
        plain = dataclasses.asdict(self.cfg)
        processes.broadcast_from_0(lambda: self._prepare(plain))
        self.log("config", self.step, config=plain, versions=environment.versions(), devices=devices.describe())

    def _prepare(self, plain: dict) -> None:
        self._make_room()
        files.write_text(self.dir / "config.json", json.dumps(plain | {"tag": self.dir.name}, indent=1))
        self.wandb = Wandb(self.dir, self.cfg.stage, self.cfg.run, plain)

    def _make_room(self) -> None:
        """Moves aside what is in the way: with resume=never the run that was here, else the steps of another future,
        and damaged ones, which would be taken for the last few to be kept."""
        if self.cfg.resume == "never" and (checkpoint.steps(self.dir) or (self.dir / run_log.LOG).exists()):
            checkpoint.move_aside(self.dir)
            self.held.enter_context(checkpoint.exclusive(self.dir))  # the first lock went with the old folder
        else:
            checkpoint.abandon_after(self.dir, self.step if self.data is not None else -1)

    def log(self, kind: str, step: int, **fields) -> None:
        if jax.process_index() > 0:
            return
        totals = {"tokens": self.totals["tokens"], "flops": self.totals["flops"]}
        run_log.append(self.dir, kind, self.cfg.stage, step, **totals, **fields)
        if kind in MEASURED:
            self.metrics[kind] = {"step": step} | fields
        shown = {f"{kind}/{k}": v for k, v in fields.items() if isinstance(v, int | float)}
        self.wandb.log(step, **shown)

    def save(self, step: int, data: dict) -> None:
        meta = checkpoint.model_meta(self.model_cfg) | {
            "stage": self.cfg.stage, "step": step, "tokenizer": self.tokenizer.hash, "totals": self.totals,
            "metrics": self.metrics, "config": dataclasses.asdict(self.cfg), "versions": environment.versions(),
            **self.identity,
        }  # fmt: skip
        timer = Timer()
        self.saver.save(step, self.state.params, self.state.opt_state, data, meta)
        self.log("checkpoint", step, path=checkpoint.step_dir(self.dir, step).name, save_seconds=timer.lap())

    def finish(self, step: int) -> None:
        self.saver.wait_all()
        self.log("note", step, text="finished")
        if self.wandb:
            self.wandb.finish()


@contextmanager
def open_run(cfg: Train, momentum: optax.Schedule | float) -> Iterator[Run | None]:
    """The run `cfg` describes, locked against a second process; None if it is finished. Saves end before it does.

    Nothing of an earlier run is touched before `Run.begin`: what is refused until then has changed nothing.
    """
    _check(cfg)
    devices.start(cfg.device_type, cfg.coordinator, cfg.num_processes, cfg.process_id)
    with processes.fail_together(), ExitStack() as held:
        # Process 0 decides and holds the lock; several processes see one file system.
        origin, tag, step, finished, identity = processes.broadcast_from_0(lambda: _plan(cfg, held))
        origin = (Path(origin[0]), origin[1]) if origin else None
        folder = checkpoint.run_dir(cfg.stage, tag)
        if finished:
            print(f"{cfg.stage}: {folder} is finished (step {step})")
            yield None
            return
        model_cfg, tokenizer = _shape_and_tokenizer(cfg, folder, step, origin)
        layout = Layout(sharding.make_mesh(cfg.mesh), cfg.shard)
        layout.check(model_cfg)
        print(f"{cfg.stage}: {folder}")
        dtype = devices.choose_precision(cfg.compute_dtype, cfg.attention, model_cfg)
        optimizer = optim.make_optimizer(
            model_cfg.n_embd, embedding_lr=cfg.embedding_lr, unembedding_lr=cfg.unembedding_lr, matrix_lr=cfg.matrix_lr,
            weight_decay=cfg.weight_decay, momentum=momentum, dtype=dtype, layout=layout,
        )  # fmt: skip
        few = "try --shard=full on several devices, or a smaller model"
        with devices.out_of_memory_explained("the weights and the optimizer's state", few):
            state, data, totals = _initial_state(cfg, model_cfg, origin, optimizer, layout, folder, step)
        saver = checkpoint.Saver(folder, cfg.keep_last, cfg.keep_every, jax.process_index(), jax.process_count())
        run = Run(
            cfg, folder, model_cfg, tokenizer, layout, dtype, optimizer, state, saver, held, step or 0, data, totals,
            identity, {} if step is None else checkpoint.read_meta(folder, step).get("metrics", {}),
        )  # fmt: skip
        try:
            yield run
        finally:
            run.saver.wait_local()  # not `wait_all`: the other processes need not be here


def _check(cfg: Train) -> None:
    """UserError for numbers that no run can have."""
    if cfg.num_iterations < 1 and cfg.num_iterations != -1:
        raise UserError(f"--num_iterations={cfg.num_iterations}: must be at least 1, or -1 to have them derived")
    for name, (low, high) in BOUNDS.items():
        value = getattr(cfg, name, low)  # not every stage has all of them
        if not low <= value <= high:
            allowed = f"at least {low}" if high == LARGEST else f"from {low} to {high}"
            raise UserError(f"--{name}={value}: must be {allowed}")


def _plan(cfg: Train, held: ExitStack) -> tuple[tuple[str, int] | None, str, int | None, bool, dict]:
    """(what a fresh start begins with, the run's tag, the step it goes on from or None, whether that is the last one,
    its identity). `held` gets the run's lock."""
    tag = cfg.model_tag or cfg.preset or (f"d{cfg.depth}" if cfg.stage == "base" else _origin(cfg)[0].name)
    folder = checkpoint.run_dir(cfg.stage, tag)
    held.enter_context(checkpoint.exclusive(folder))
    checkpoint.clear_unfinished(folder)
    step = _step_to_resume(cfg, folder)
    if step is not None:
        meta = checkpoint.read_meta(folder, step)
        _check_same_run(cfg, folder, meta)
        return None, tag, step, _finished(folder, step), {"parent": meta["parent"]}
    origin = _origin(cfg)
    return (str(origin[0]), origin[1]) if origin else None, tag, None, False, {"parent": _content(cfg, origin)}


def _origin(cfg: Train) -> tuple[Path, int] | None:
    """Run and step a stage starts from: of this run's own tag where there is one, else the preset's, else, without a
    preset, the latest. None for base."""
    if cfg.stage == "base":
        return None
    if cfg.model_tag and checkpoint.steps(checkpoint.run_dir(cfg.source, cfg.model_tag)):
        return checkpoint.find(cfg.source, cfg.model_tag)
    return checkpoint.find(cfg.source, cfg.preset)


def _shape_and_tokenizer(cfg: Train, folder: Path, step: int | None, origin) -> tuple[GPTConfig, Tokenizer]:
    """From the run itself when it goes on, else from the run before; base makes its shape of the settings."""
    tokenizer_dir = config.base_dir() / "tokenizer"
    if cfg.stage == "base" and step is None:
        tokenizer = Tokenizer.load(tokenizer_dir)
        return cfg.gpt_config(tokenizer.vocab_size), tokenizer
    run, at = (folder, step) if step is not None else origin
    meta = checkpoint.read_meta(run, at)
    if cfg.stage == "base" and Tokenizer.load(tokenizer_dir).hash != meta["tokenizer"]:
        raise UserError(f"{folder} was trained with another tokenizer than the one in {tokenizer_dir}: {INSTEAD}")
    return GPTConfig(**meta["model"]), checkpoint.load_tokenizer(meta, run)


def _content(cfg: Train, origin: tuple[Path, int] | None) -> str:
    """Names the weights a run starts from, by content."""
    if origin is None:
        return ""
    run, step = origin
    manifest = (checkpoint.step_dir(run, step) / checkpoint.MANIFEST).read_bytes()
    return f"{cfg.source} {run.name} step {step} {hashlib.sha256(manifest).hexdigest()[:16]}"


def _step_to_resume(cfg: Train, folder: Path) -> int | None:
    """The step to go on from, None to start."""
    if cfg.resume == "never":
        return None
    if cfg.resume == "auto":
        return checkpoint.latest(folder)
    if not cfg.resume.isdigit():
        raise UserError(f"--resume={cfg.resume}: must be auto, never or a step")
    step = int(cfg.resume)
    if step not in (there := checkpoint.steps(folder)):
        steps = ", ".join(map(str, there)) or "none"
        raise UserError(f"--resume={step}: no checkpoint of it in {folder}; there are: {steps}")
    if wrong := checkpoint.damage(checkpoint.step_dir(folder, step)):
        raise UserError(f"--resume={step}: {checkpoint.step_dir(folder, step)}: {wrong}")
    return step


def _check_same_run(cfg: Train, folder: Path, meta: dict) -> None:
    """UserError where the run in `folder` is not the one that is asked for."""
    other = "weights" if _starts_elsewhere(cfg, meta["parent"]) else ""
    if changed := _changed_settings(cfg, meta["config"]):
        other = f"settings ({', '.join(changed[:4])})"
    if other:
        raise UserError(f"{folder} holds a run started from other {other}: {INSTEAD}")


def _starts_elsewhere(cfg: Train, parent: str) -> bool:
    """Whether a fresh start would begin with other weights. Where there are none any more, a run needs only its own."""
    try:
        return _content(cfg, _origin(cfg)) != parent
    except UserError:
        return False


def _changed_settings(cfg: Train, then: dict) -> list[str]:
    """What matters and is not as it was. A setting younger than the run had its default; one that is gone is named."""
    now, default = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)())
    if gone := sorted(then.keys() - now.keys()):
        print(f"settings of this run that there are no more, and that are ignored: {', '.join(gone)}")
    names = [k for k in now if k not in FREE and now[k] != then.get(k, default[k])]
    return [f"{k}: {then.get(k, default[k])!r}, now {now[k]!r}" for k in names]


def _finished(folder: Path, step: int) -> bool:
    notes = [r for r in run_log.read(folder) if r["kind"] == "note" and r.get("text") == "finished"]
    return any(r["step"] == step for r in notes)


def _initial_state(
    cfg: Train, model_cfg: GPTConfig, origin, optimizer, layout: Layout, folder: Path, step: int | None
):  # fmt: skip
    """(state, position in the data or None, totals): restored, or from the stage before, or fresh."""

    def fresh():
        params = gpt.init(model_cfg, cfg.seed)
        return TrainState(params, optimizer.init(params))

    abstract = jax.eval_shape(fresh)
    specs = TrainState(layout.param_specs(abstract.params), layout.shard_specs(abstract.opt_state))
    places = layout.shardings(specs)

    totals = {"seconds": 0.0, "tokens": 0, "flops": 0}
    if step is None and origin is None:
        print(f"starting from scratch, seed {cfg.seed}")
        return jax.jit(fresh, out_shardings=places)(), None, totals
    target = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)
    if step is None:
        run, at = origin
        print(f"starting from {run.relative_to(config.base_dir())}, step {at}")
        params = checkpoint.restore_params(run, at, target.params)
        return TrainState(params, jax.jit(optimizer.init, out_shardings=places.opt_state)(params)), None, totals
    params, opt_state, data, meta = checkpoint.restore(folder, step, target.params, target.opt_state)
    print(f"resuming at step {step}")
    return TrainState(params, opt_state), data, meta["totals"]


def step_of(run: Run) -> Callable:
    """The step of a run, not yet compiled."""
    return make_step(run.model_cfg, run.optimizer, run.dtype, run.cfg.grad_clip, run.layout, execution(run.cfg))


def out_of_memory_in_step(rows: int):
    """Around steps of which a device takes `rows` rows at once."""
    less = f"lower --device_batch_size (now {rows}), or " if rows > 1 else ""
    return devices.out_of_memory_explained("a step", f"{less}try --remat=full or --shard=full")


def compiled_memory(run: Run, grad_accum_steps: int, rows: int) -> int:
    """Bytes of one device that the compiled step holds at its peak."""
    mesh = run.layout.mesh
    shape = (grad_accum_steps, rows * sharding.replicas(mesh), run.model_cfg.sequence_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.micro_batch_sharding(mesh))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)
    step = step_of(run)
    used = step.lower(like, {"inputs": ids, "targets": ids}, jnp.float32(1)).compile().memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
