"""A training run: its model, optimizer state, folder and log."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nanochat_jax import checkpoint, config, environment, files, run_log, trained_model
from nanochat_jax.config import GPTConfig, Train, UserError
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, processes, sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.progress import Timer, clock, count_of
from nanochat_jax.tasks import published
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import optim, wandb_log
from nanochat_jax.training.start_plan import INSTEAD, StartPlan, make_plan
from nanochat_jax.training.step import TrainState, execution, make_step
from nanochat_jax.training.wandb_log import Wandb

MEASURED = ("train", "val", "core")  # a checkpoint contains the last log record of each of these kinds


@dataclass
class Run:
    """A run that is open for training."""

    cfg: Train
    dir: Path
    model_cfg: GPTConfig
    tokenizer: Tokenizer
    layout: Layout  # the mesh, and how weights and optimizer state are sharded on it
    dtype: DTypeLike  # the dtype of matmul operands
    fused: bool  # whether the kernels of model/fused compute the blocks
    optimizer: optax.GradientTransformation
    plan: StartPlan  # how the run starts
    state: TrainState  # only shapes until `load_state`; then replaced by every step
    saver: checkpoint.Saver
    lock: ExitStack  # holds the lock of the run's folder in process 0; empty in other processes
    step: int  # the step to resume from; 0 for a fresh start
    data: dict | None  # the position in the data to resume from; None for a fresh start
    totals: dict  # seconds, tokens and FLOPs spent so far
    origin: dict  # what the run began with, such as its parent and its data; saved in checkpoints
    metrics: dict  # the last log record of each kind in MEASURED
    wandb: Wandb | None = None  # set by `begin`, in process 0 only

    @property
    def eval_model(self) -> EvalModel:
        """The model with the current weights, for evaluations."""
        return EvalModel(self.state.params, self.model_cfg, self.tokenizer, self.dtype)

    def random_state(self) -> TrainState:
        """Returns random weights and an empty optimizer state, on the devices."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        return jax.jit(lambda: new_state(self.model_cfg, self.optimizer, self.cfg.seed), out_shardings=shardings)()

    def load_state(self) -> None:
        """Puts the weights and the optimizer's state on the devices.

        A run that resumes takes both from its checkpoint. A new run starts with the parent's weights or, without a
        parent, with random weights. With --dry_run, does nothing, because the shapes are enough to plan the run.

        Call this after the batch shape is known: `batch_trial.choose_rows` needs the memory for a state of its own.
        """
        if not self.cfg.dry_run:
            with out_of_memory_in_state():
                self.state = _initial_state(self)

    def begin(self) -> None:
        """Prepares the run's folder and logs the start. Call this after all checks, since it moves old files aside."""
        plain = dataclasses.asdict(self.cfg)
        processes.broadcast_from_0(lambda: self._prepare(plain))
        self.log("config", self.step, config=plain, versions=environment.versions(), devices=devices.describe())

    def _prepare(self, plain: dict) -> None:
        self._check_disk()
        self._make_room()
        about = {"tag": self.dir.name, "parent": self.origin["parent"]}
        files.write_text(self.dir / "config.json", json.dumps(plain | about, indent=1))
        self.wandb = Wandb(self.dir, self.cfg.stage, self.cfg.run, plain)

    def _check_disk(self) -> None:
        """Raises UserError if the disk has no room for a single checkpoint.

        With --save_every, --keep_last checkpoints and the one that is being written exist at the same time. If the disk
        has no room for all of them, prints a warning. It is no error, because the run may end before.
        """
        arrays = jax.tree.leaves((self.state.params, self.state.opt_state))
        one, disk = sum(x.nbytes for x in arrays), shutil.disk_usage(self.dir)
        kept = [step for step in checkpoint.steps(self.dir) if step <= self.step] if self.data is not None else []
        count = max(1, self.cfg.keep_last + 1 - len(kept)) if self.cfg.save_every > 0 else 1
        if not disk.total:  # some network file systems report a size of 0
            return
        free = f"{disk.free / 1e6:,.0f}"
        if disk.free < one:
            raise UserError(
                f"{self.dir}: the disk has {free} MB free, and a checkpoint takes about {one / 1e6:,.0f} MB: make "
                "room, or set NANOCHAT_BASE_DIR to a folder on another disk"
            )
        if disk.free < count * one:
            print(
                f"warning: {self.dir}: the disk has {free} MB free, and {count} checkpoints at a time take about "
                f"{count * one / 1e6:,.0f} MB: make room, or lower --keep_last (now {self.cfg.keep_last})"
            )

    def _make_room(self) -> None:
        """Moves old files out of the way.

        With --resume=never, the whole folder is moved. Otherwise, all checkpoints after the step to resume from are
        moved. If they stayed, they would count toward --keep_last, even if they are damaged.
        """
        if self.cfg.resume == "never" and (checkpoint.steps(self.dir) or (self.dir / run_log.LOG).exists()):
            checkpoint.move_aside(self.dir)
            self.lock.enter_context(checkpoint.exclusive(self.dir))  # the old lock file was moved with the folder
        else:
            checkpoint.abandon_after(self.dir, self.step if self.data is not None else -1)

    def put_scalar(self, value: float) -> jax.Array:
        """Returns `value` as a float32 scalar on every device of the mesh."""
        return jax.make_array_from_process_local_data(sharding.replicated(self.layout.mesh), np.float32(value))

    def count_time(self, step: int, seconds: float) -> None:
        """Adds the time of a step to the training time, which leaves out the first steps (config.UNTIMED_STEPS)."""
        if step > config.UNTIMED_STEPS:
            self.totals["seconds"] += seconds

    def describe_time(self, steps: int) -> str:
        """Returns a text such as "340 steps in 2m10s (without the first 10)".

        If the run was resumed, the time also includes the steps before that.
        """
        untimed = config.UNTIMED_STEPS
        time = f" in {clock(self.totals['seconds'])} (without the first {untimed})" if steps > untimed else ""
        return f"{count_of(steps, 'step')}{time}"

    def log(self, kind: str, step: int, **fields) -> None:
        """Adds a record to log.jsonl, and sends the record's numbers to wandb. Only process 0 logs."""
        if jax.process_index() > 0:
            return
        totals = {"tokens": self.totals["tokens"], "flops": self.totals["flops"]}
        run_log.append(self.dir, kind, self.cfg.stage, step, **totals, **fields)
        if kind in MEASURED:
            self.metrics[kind] = {"step": step} | fields
        if self.wandb:
            self.wandb.log(step, **wandb_log.numbers(self.cfg.stage, kind, fields, self.totals))

    def save(self, step: int, data: dict) -> None:
        """Starts saving a checkpoint in the background. `data` is the position in the data."""
        meta = checkpoint.model_meta(self.model_cfg) | {
            "stage": self.cfg.stage, "step": step, "time": round(time.time(), 3), "tokenizer": self.tokenizer.hash,
            "totals": self.totals, "metrics": self.metrics, "config": dataclasses.asdict(self.cfg),
            "versions": environment.versions(), **self.origin,
        }  # fmt: skip
        timer = Timer()
        self.saver.save(step, self.state.params, self.state.opt_state, data, meta)
        self.log("checkpoint", step, path=checkpoint.step_dir(self.dir, step).name, save_seconds=timer.lap())

    def finish(self, step: int) -> None:
        """Waits until the last checkpoint is complete, then logs that the run has finished."""
        self.saver.wait_all()
        self.log("note", step, text="finished")
        if self.wandb:
            self.wandb.finish()


@contextmanager
def open_run(cfg: Train, momentum: optax.Schedule | float) -> Generator[Run | None]:
    """Opens the run that `cfg` describes, and locks its folder. Yields None if the run is finished.

    Complete checkpoints stay unchanged until `Run.begin`, so a refused start does no harm. On exit, waits until this
    process has written its part of the last checkpoint.

    The run has no weights yet: set up its data and its batch, and then call `Run.load_state`.
    """
    devices.start(cfg.device_type, cfg.coordinator, cfg.num_processes, cfg.process_id)
    records = published.without_records() if cfg.dry_run else nullcontext()
    with processes.fail_together(), records, ExitStack() as lock:
        # Only process 0 makes the plan and holds the lock, since all processes share one file system.
        plan = StartPlan(**processes.broadcast_from_0(lambda: dataclasses.asdict(make_plan(cfg, lock))))
        folder = checkpoint.run_dir(cfg.stage, plan.tag)
        if plan.finished:
            print(f"{cfg.stage}: {folder} is finished (step {plan.step})")
            yield None
            return
        model_cfg, tokenizer = _model_cfg_and_tokenizer(cfg, folder, plan)
        layout = Layout(sharding.make_mesh(cfg.mesh), cfg.shard)
        layout.check(model_cfg)
        print(f"{cfg.stage}: {folder}")
        dtype = devices.choose_precision(cfg.compute_dtype, cfg.attention, model_cfg)
        resumes = plan.step is not None
        meta = checkpoint.read_meta(folder, plan.step) if resumes else {}
        fused = choose_blocks(cfg, model_cfg, layout, dtype, meta.get("fused"))
        optimizer = optimizer_of(cfg, model_cfg, momentum, dtype, layout)
        state = state_shapes(model_cfg, optimizer, layout)
        print(_describe_start(cfg, plan))
        run = Run(
            cfg=cfg,
            dir=folder,
            model_cfg=model_cfg,
            tokenizer=tokenizer,
            layout=layout,
            dtype=dtype,
            fused=fused,
            optimizer=optimizer,
            plan=plan,
            state=state,
            saver=checkpoint.Saver(folder, cfg.keep_last, cfg.keep_every, jax.process_index(), jax.process_count()),
            lock=lock,
            step=plan.step or 0,
            data=files.read_json(checkpoint.step_dir(folder, plan.step) / "data.json") if resumes else None,
            totals=meta.get("totals", {"seconds": 0.0, "tokens": 0, "flops": 0}),
            origin={"parent": plan.parent_id, "fused": fused},
            metrics=meta.get("metrics", {}),
        )
        try:
            yield run
        finally:
            run.saver.wait_local()  # not `wait_all`: after an error, the other processes may never reach this point


def optimizer_of(
    cfg: Train, model_cfg: GPTConfig, momentum: optax.Schedule | float, dtype: DTypeLike, layout: Layout
) -> optax.GradientTransformation:
    """Returns the optimizer with the settings of `cfg`."""
    return optim.make_optimizer(
        model_cfg.n_embd, embedding_lr=cfg.embedding_lr, unembedding_lr=cfg.unembedding_lr, matrix_lr=cfg.matrix_lr,
        weight_decay=cfg.weight_decay, momentum=momentum, dtype=dtype, layout=layout,
    )  # fmt: skip


def choose_blocks(
    cfg: Train, model_cfg: GPTConfig, layout: Layout, dtype: DTypeLike, before: bool | None = None
) -> bool:
    """Returns whether the kernels of model/fused compute the blocks. Prints the choice if there is a GPU.

    A run that resumes keeps its choice, so that its losses do not depend on the times of a second trial. `before` is
    that choice, or None for a new run.
    """
    if jax.default_backend() != "gpu" or execution(cfg, layout).fused is None:
        return False
    from nanochat_jax.model.fused import trial  # imports Pallas, which CPUs do not need

    if before is False:
        fused, reason = False, "as in the run so far"
    else:
        fused, reason = trial.choose(model_cfg, dtype, must_be_faster=before is None)
    everywhere = bool(processes.all_min(int(fused)))  # all processes must compile the same program
    if fused and not everywhere:
        fused, reason = False, "another process cannot use fused kernels"
    print(f"blocks by {'fused kernels' if fused else 'XLA'} ({reason})")
    return fused


def _model_cfg_and_tokenizer(cfg: Train, folder: Path, plan: StartPlan) -> tuple[GPTConfig, Tokenizer]:
    """Returns the model's shape and its tokenizer.

    A run that resumes takes both from its own checkpoint. A new run of a later stage takes both from its parent's
    checkpoint. A new base run takes the shape from `cfg` and the tokenizer from `config.base_dir()`.
    """
    tokenizer_dir = config.base_dir() / "tokenizer"
    if plan.step is not None:
        run_dir, step = folder, plan.step
    elif plan.parent is not None:
        run_dir, step = plan.parent
    else:
        assert isinstance(cfg, config.Base), f"stage {cfg.stage} has no parent"
        tokenizer = Tokenizer.load(tokenizer_dir)
        return cfg.gpt_config(tokenizer.vocab_size), tokenizer
    meta = checkpoint.read_meta(run_dir, step)
    if cfg.stage == "base" and Tokenizer.load(tokenizer_dir).hash != meta["tokenizer"]:
        raise UserError(f"{folder} was trained with a different tokenizer from the one in {tokenizer_dir}: {INSTEAD}")
    return GPTConfig(**meta["model"]), trained_model.load_tokenizer(meta, run_dir)


def new_state(model_cfg: GPTConfig, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """Returns random weights and an empty optimizer state."""
    params = gpt.init(model_cfg, seed)
    return TrainState(params, optimizer.init(params))


def _describe_start(cfg: Train, plan: StartPlan) -> str:
    if plan.step is not None:
        return f"resuming at step {plan.step}"
    if plan.parent is not None:
        return f"starting from {trained_model.described(*plan.parent)}"
    return f"starting from scratch, seed {cfg.seed}"


def _initial_state(run: Run) -> TrainState:
    plan, target = run.plan, run.state
    if plan.step is not None:
        params, opt_state, *_ = checkpoint.restore(run.dir, plan.step, target.params, target.opt_state)
        return TrainState(params, opt_state)
    if plan.parent is not None:
        params = checkpoint.restore_params(*plan.parent, target.params)
        shardings = jax.tree.map(lambda x: x.sharding, target.opt_state)
        return TrainState(params, jax.jit(run.optimizer.init, out_shardings=shardings)(params))
    return run.random_state()


def state_shapes(model_cfg: GPTConfig, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Returns the shapes and shardings of the weights and the optimizer state."""
    abstract = jax.eval_shape(lambda: new_state(model_cfg, optimizer))
    specs = TrainState(layout.param_specs(abstract.params), layout.shard_specs(abstract.opt_state))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout.shardings(specs)
    )


def state_bytes(cfg: Train, model_cfg: GPTConfig, layout: Layout, dtype: DTypeLike) -> tuple[int, int]:
    """Returns the bytes of the weights and of the optimizer state on each device."""
    state = state_shapes(model_cfg, optimizer_of(cfg, model_cfg, 0.95, dtype, layout), layout)

    def on_each_device(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)

    return on_each_device(state.params), on_each_device(state.opt_state)


def batch_shapes(
    mesh: Mesh, grad_accum_steps: int, rows: int, seq_len: int
) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a step's batch and of its learning-rate factor.

    `rows` is the number of rows that each replica computes at once.
    """
    shape = (grad_accum_steps, rows * sharding.replicas(mesh), seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.micro_batch_sharding(mesh))
    lr_mult = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    return {"inputs": ids, "targets": ids}, lr_mult


def step_of(run: Run) -> jax.stages.Wrapped:
    """Returns the jitted step of a run (see `make_step`), which is not compiled yet."""
    how = execution(run.cfg, run.layout if run.fused else None)
    return make_step(run.model_cfg, run.optimizer, run.dtype, run.cfg.grad_clip, run.layout, how)


def no_implicit_transfers() -> AbstractContextManager[None]:
    """Within this context, JAX raises an error if a step's argument is on the host or on the wrong devices.

    Without this context, JAX would copy the argument to the right devices.
    """
    return jax.transfer_guard("disallow")


def check_finite(run: Run, step: int, loss: float, grad_norm: float) -> None:
    """Raises UserError if the loss or the gradient norm of a step is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"the loss is {loss} and the gradient norm {grad_norm} at step {step}: lower the learning rates; "
            f"{checkpoint.last_good(run.dir)} in {run.dir}"
        )


def out_of_memory_in_step(rows: int) -> AbstractContextManager[None]:
    """Within this context, an out-of-memory error becomes a UserError with advice.

    `rows` is the number of rows that each replica computes at once.
    """
    fewer_rows = f"lower --device_batch_size (now {rows}), or " if rows > 1 else ""
    return devices.out_of_memory_explained("a step", f"{fewer_rows}try --remat=full or --shard=full")


def out_of_memory_in_state() -> AbstractContextManager[None]:
    """Within this context, an out-of-memory error becomes a UserError about the weights and the optimizer's state."""
    advice = "try --shard=full on several devices, or a smaller model"
    return devices.out_of_memory_explained("the weights and the optimizer's state", advice)


def compile_step(run: Run, grad_accum_steps: int, rows: int) -> jax.stages.Compiled:
    """Compiles the step of a run. `rows` is the number of rows that each replica computes at once.

    With one process, the step's arguments have the same shapes and shardings as in the loop, so the loop finds this
    compiled step in the compilation cache.
    """
    batch, lr_mult = batch_shapes(run.layout.mesh, grad_accum_steps, rows, run.model_cfg.sequence_len)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)
    return step_of(run).lower(state, batch, lr_mult).compile()


def peak_memory(step: jax.stages.Compiled) -> int:
    """Returns the peak memory of a compiled program on one device, in bytes."""
    used = step.memory_analysis()
    assert used is not None, "this backend does not report the memory of a compiled program"
    return used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
