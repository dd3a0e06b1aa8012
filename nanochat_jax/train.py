"""The loop that pretraining, midtraining and finetuning share.

The three stages differ in where rows come from and in how the learning rate falls; the rest is one story: fetch a
batch, step, log the step before (so that the device never waits for the host), and from time to time save, validate,
evaluate and sample. Saving comes before evaluating, so that no evaluation can cost a run its weights; and when text or
an evaluation fails with an error, a run in one process saves its state before it ends.
"""

import dataclasses
import functools
import math
import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

from nanochat_jax import checkpoint, config, dataloader, dataset, metrics, optim, parallel, sharding, tasks, tokenized
from nanochat_jax.config import GPTConfig, Train, UserError
from nanochat_jax.run import INSTEAD, Interruption, Run, Timer, open_run, same_tasks
from nanochat_jax.step import (
    Geometry,
    compiled_memory,
    geometry,
    geometry_of_rows,
    rows_of_examples,
    rows_that_fit,
    step_of,
)

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)

# -----------------------------------------------------------------------------
# Where rows come from, and how many steps


@dataclass
class Stage:
    """What sets base, mid and sft apart."""

    geometry: Geometry
    steps: int | None  # optimizer steps, None: until the loader ends
    loader: dataloader.Loader
    validation: Callable[[], dataloader.Loader]
    lr_mult: Callable[[int, float], float]  # (step, progress in [0, 1]) -> factor on the learning rates
    facts: dict = field(default_factory=dict)  # derived numbers to print


def _process(run: Run) -> dict:
    index, count = sharding.share_of_rows(run.layout.mesh)
    return {"process_index": index, "process_count": count}


def base_stage(run: Run) -> Stage:
    cfg, model = run.cfg, run.model
    devices = sharding.replicas(run.layout.mesh)
    fit = functools.partial(rows_that_fit, model, need=functools.partial(compiled_memory, run))
    shape = geometry(cfg.total_batch_size, cfg.device_batch_size, model.sequence_len, devices, fit)
    steps = horizon(cfg, model, shape.tokens)
    source = same_text(run, dataset.open(cfg.data, cfg.data_dir))
    how = {"packing": cfg.packing, "twins": tokenized.folder_of(source, run.tokenizer), **_process(run)}
    return Stage(
        geometry=shape,
        steps=steps,
        loader=dataloader.base_loader(
            source.train_files, run.tokenizer, shape.total_rows, model.sequence_len, seed=cfg.seed, **how
        ),
        validation=lambda: dataloader.val_batches(
            source.val_files, run.tokenizer, shape.rows * shape.replicas, model.sequence_len, cfg.eval_tokens, **how
        ),
        lr_mult=lambda step, _: optim.trapezoid(step, steps, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac),
        facts={
            "text": text_needed(source, steps * shape.tokens, run.tokenizer, how["twins"]),
            "tokens a parameter": f"{steps * shape.tokens / model.num_params:.2f}",
        },
    )


def same_text(run: Run, source: dataset.Source) -> dataset.Source:
    """The text to read, which is recorded with the checkpoints: the files a run began with, since in later epochs their
    order depends on how many there are. UserError where it is not that of the checkpoint the run goes on from."""
    text = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    count = len(source.train_files)
    if run.data is not None:
        folder = checkpoint.step_dir(run.dir, run.step)
        then = checkpoint.read_meta(run.dir, run.step).get("text", text)
        if changed := ", ".join(key for key in text if text[key] != then.get(key)):
            raise UserError(f"the text is not that of {folder} (other {changed}): {INSTEAD}")
        count = then.get("files", count)
        if count > len(source.train_files):
            raise UserError(
                f"{folder} is of {count} files of {source.name}, there are {len(source.train_files)}: get all of them "
                f"with python -m nanochat_jax.dataset --data={source.name} -n {count}"
            )
    run.identity["text"] = text | {"files": count}
    return dataclasses.replace(source, train_files=source.train_files[:count])


def text_needed(source: dataset.Source, tokens: int, tokenizer, twins: Path) -> str:
    """How much of a source a run will read."""
    files = source.train_files
    there = dataloader.epoch_tokens(files, tokenizer, twins)
    if none := math.isnan(there):  # the validation shard is, and about as large
        there = dataloader.epoch_tokens(source.val_files, tokenizer, twins) / len(source.val_files) * len(files)
    epochs = tokens / max(1.0, there)
    shards = min(len(files), math.ceil(epochs * len(files)))
    said = f"{source.name}, {len(files)} files of about {metrics.short(there / len(files))} tokens"
    said += ", none of them here yet" if none else ""
    if made := tokenized.made(files, twins):
        said += f", {made} of them tokenized before"
    said += f"; this run needs {shards}, {epochs:.2f} epochs"
    # Up to 4, reading text again is about as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
    return said + (" (more than 4: new text would teach more)" if epochs > 4 else "")


def horizon(cfg: config.Base, model: GPTConfig, tokens: int) -> int:
    """Steps of `tokens` tokens: as many as given, else FLOPs if given, else tokens in proportion to the parameters."""
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = round(cfg.target_flops / (model.flops_per_token * tokens))
    else:
        steps = int(cfg.target_param_data_ratio * model.num_params) // tokens
    if steps < 1:
        raise UserError(f"the horizon comes to {steps} steps of {tokens:,} tokens: raise --num_iterations")
    return steps


def chat_stage(run: Run) -> Stage:
    """Midtraining: packed conversations, loss on all tokens. Finetuning: whole ones, loss on the assistant's."""
    cfg, model, mid = run.cfg, run.model, run.cfg.stage == "mid"
    task = tasks.mixture(cfg.mixture, "train", cfg.task_data_dir)
    same_tasks(run, task)
    held_out = tasks.mixture(cfg.val_mixture, "val", cfg.task_data_dir)
    length = dataloader.mean_tokens(task, run.tokenizer)
    fit = functools.partial(rows_that_fit, model, need=functools.partial(compiled_memory, run))
    how = (cfg.device_batch_size, model.sequence_len, sharding.replicas(run.layout.mesh), fit)
    if cfg.total_batch_size:
        shape = geometry(cfg.total_batch_size, *how)
    else:  # finetuning alone has no default
        shape = geometry_of_rows(rows_of_examples(cfg.target_examples_per_step, length, model.sequence_len), *how)
    steps = cfg.num_iterations if cfg.num_iterations > 0 else None
    epochs = None if steps else (1 if mid else cfg.num_epochs)
    rows = functools.partial(dataloader.chat_loader, supervise="all" if mid else "mask", **_process(run))
    return Stage(
        geometry=shape,
        steps=steps,
        loader=rows(
            task, run.tokenizer, shape.total_rows, model.sequence_len, epochs=epochs, seed=cfg.seed,
            padding=shape.padding,
        ),
        validation=lambda: rows(
            held_out, run.tokenizer, shape.rows * shape.replicas, model.sequence_len, epochs=1,
            max_rows=max(1, cfg.eval_tokens // model.sequence_len),
        ),
        lr_mult=lambda step, progress: cfg.init_lr_frac * (optim.late_decay if mid else optim.linear_decay)(progress),
        facts={
            "conversations": f"{len(task):,} of {length:.0f} tokens ({', '.join(cfg.mixture)})",
            "steps an epoch, about": f"{len(task) * length / shape.tokens:,.0f}",
        },
    )  # fmt: skip


# -----------------------------------------------------------------------------
# The loop


def train(cfg: config.Base | config.Mid | config.Sft) -> None:
    """Runs one stage to its end, or goes on with it."""
    momentum = 0.95 if cfg.stage == "sft" else optim.momentum_warmup
    with open_run(cfg, momentum) as run, Interruption() as interruption, ExitStack() as held:
        if run is None:
            return
        stage = base_stage(run) if cfg.stage == "base" else chat_stage(run)
        if run.data is not None:
            stage.loader.restore(run.data)
        evaluations = evaluations_of(cfg)
        step_fn = step_of(run)
        run.begin()
        announce(run, stage)
        log = StepLog(run, stage)
        step, ended = run.step, False
        place = stage.loader.state()  # after the last batch that was trained on
        saved_at = run.step if run.data is not None else -1
        evaluated_at: dict[Evaluation, int] = {}
        held.enter_context(parallel.out_of_memory_explained(stage.geometry.rows))

        def save() -> None:
            nonlocal saved_at
            log.flush()
            run.save(step, place)
            saved_at = step
            log.timer.lap()  # saving is no part of the next step

        def rescue() -> None:
            """Of a run that ends with an error which the state has no part in. Several processes cannot save then: the
            others are elsewhere."""
            if step == 0 or saved_at == step or jax.process_count() > 1:
                return
            try:
                save()
                run.saver.wait()
                print(f"saved at step {step}, before the error")
            except Exception as error:  # the error that was first is the one to tell; or the last loss is not finite
                print(f"not saved: {error}")

        while True:
            last = ended or step == stage.steps
            due = [e for e in evaluations if evaluated_at.get(e) != step and e.due(step, last)]
            # Save before evaluating: whatever goes wrong below, the weights are safe.
            risky = any(e.risky or e not in evaluated_at for e in due)
            to_save = risky or (cfg.save_every > 0 and step % cfg.save_every == 0)
            stop = interruption.signal if jax.process_count() == 1 else log.stop
            if (last or stop or (to_save and step > 0)) and saved_at != step:
                save()
            if stop:
                run.saver.wait()
                print(f"saved at step {step}: the same command goes on from here")
                raise SystemExit(128 + stop)
            if due:
                log.flush()
                if risky:  # it may take the process with it: the checkpoint is to be there, not on its way
                    run.saver.wait()
                for evaluation in due:
                    try:
                        evaluation.run(run, stage, step)
                    except Exception:
                        rescue()
                        raise
                    evaluated_at[evaluation] = step
                log.timer.lap()
            if last:
                break
            # A shard may be long in coming. Of several processes none may stop alone.
            waiting = interruption.at_once() if jax.process_count() == 1 else nullcontext()
            try:
                with waiting:
                    batch = next(stage.loader)
                    arrived = stage.loader.state()
            except StopIteration:
                ended = True
                continue
            except InterruptedError:
                if interruption.signal is None:
                    raise
                continue
            except Exception:
                rescue()
                raise
            place = arrived
            progress = step / stage.steps if stage.steps else _progress(run, stage)
            lr_mult = stage.lr_mult(step, progress)
            waited = log.timer.lap() if log.timed else 0.0
            arrays = stage.geometry.shaped(batch, run.layout.mesh, run.model.vocab_size)
            if jax.process_count() > 1:  # all stop after the same step: where its results, with all wishes, are read
                wish = interruption.signal is not None or run.saver.failed
                arrays["stop"] = sharding.put_flag(run.layout.mesh, wish)
            run.state, results = step_fn(run.state, arrays, jnp.float32(lr_mult))
            step += 1
            run.saver.check()
            log.push(step, results, lr_mult, waited, progress)
        stage.loader.close()
        run.finish(step)
        print(f"{cfg.stage}: done, {step} steps in {metrics.clock(run.totals['seconds'])} (compilation left out)")


def _progress(run: Run, stage: Stage) -> float:
    return stage.loader.info["progress"] / (1 if run.cfg.stage == "mid" else run.cfg.num_epochs)


def announce(run: Run, stage: Stage) -> None:
    """Everything derived, before the first step."""
    g, model = stage.geometry, run.model
    tokens = f"{stage.steps * g.tokens:,}" if stage.steps else "one pass over the data"
    facts = {
        "model": f"{model.n_layer} layers, width {model.n_embd}, {model.n_head} heads ({model.n_kv_head} kv), "
        f"vocabulary {model.vocab_size:,}, context {model.sequence_len}",
        "parameters": f"{model.num_params:,}",
        "FLOPs a token": f"{model.flops_per_token:.3e}",
        "batch": f"{g.tokens:,} tokens = {g.micro} micro-batches x {g.rows} rows x {g.replicas} replicas x {g.seq_len}"
        + (f", less {g.padding} empty rows" if g.padding else ""),
        "mesh": ", ".join(f"{name}={size}" for name, size in run.layout.mesh.shape.items()),
        "steps": f"{stage.steps or 'until the data end'} ({tokens} tokens)" if stage.steps else tokens,
        **stage.facts,
    }
    if stage.steps:
        facts["total FLOPs"] = f"{stage.steps * g.tokens * model.flops_per_token:.3e}"
    peak = parallel.peak_flops()
    facts["expected time"] = "n/a: this device's peak is not known; see the eta below"
    if stage.steps and peak:
        seconds = stage.steps * g.tokens * model.flops_per_token / (0.5 * peak)
        facts["expected time"] = f"{metrics.clock(seconds)} at an MFU of 50%"
    for name, value in facts.items():
        print(f"  {name}: {value}")
    print("compiling the first step ...", flush=True)


class StepLog:
    """Logs each step one step late, prints a line every few seconds, and stops a run whose loss is not finite."""

    def __init__(self, run: Run, stage: Stage, print_every: float = 5.0):
        self.run, self.stage, self.print_every = run, stage, print_every
        self.timer, self.peak = Timer(), parallel.peak_flops()
        self.timed = False  # the first step of a process compiles: its time says nothing
        self.stop: int | None = None  # the signal to end with, once any process has had one
        self._pending: tuple | None = None
        self._smooth, self._weight = 0.0, 0.0
        self._since_print = Timer()
        self._steps_timed, self._seconds_timed = 0, 0.0

    def push(self, step: int, results: dict, lr_mult: float, waited: float, progress: float) -> None:
        info = dict(self.stage.loader.info)
        self.flush()
        self._pending = (step, results, lr_mult, waited, progress, info)

    def flush(self) -> None:
        """Waits for the step pushed last and logs it."""
        if self._pending is None:
            return
        step, results, lr_mult, waited, progress, info = self._pending
        self._pending = None
        loss, grad_norm = float(results["loss"]), float(results["grad_norm"])
        if results.get("stop", 0) > 0:
            self.stop = signal.SIGTERM
        elapsed = self.timer.lap() + waited
        dt = elapsed if self.timed else None
        self.timed = True
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"the loss is {loss}, its gradient's norm {grad_norm} at step {step}: lower the learning rates; "
                f"the last good checkpoint is kept in {self.run.dir}"
            )
        tokens = self.stage.geometry.tokens
        flops = tokens * self.run.model.flops_per_token
        totals = self.run.totals
        totals["tokens"] += tokens
        totals["flops"] += flops
        if dt is not None:
            totals["seconds"] += dt
            self._steps_timed += 1
            self._seconds_timed += dt
        self._smooth, self._weight = 0.9 * self._smooth + 0.1 * loss, 0.9 * self._weight + 0.1
        speed = tokens / dt if dt else None
        mfu = flops / dt / self.peak if dt and self.peak else None
        known = {k: info.get(k) for k in ("epoch", "shard", "row_group", "waste", "skipped", "truncated")}
        self.run.log(
            "train", step, loss=loss, lr_mult=lr_mult, grad_norm=grad_norm, dt=dt, tok_per_s=speed, mfu=mfu,
            loader_wait=waited, counted=int(results["count"]), **known,
        )  # fmt: skip
        if step in (1, self.stage.steps) or self._since_print.passed(self.print_every):
            self._print(step, grad_norm, lr_mult, dt, speed, mfu, progress, waited, info)

    def _print(self, step, grad_norm, lr_mult, dt, speed, mfu, progress, waited, info) -> None:
        """One line; nothing is said of a full learning rate. Waste and wait are always told: a wait should read 0."""
        of = f"/{self.stage.steps}" if self.stage.steps else ""
        parts = [
            f"step {step}{of} ({100 * (step / self.stage.steps if self.stage.steps else progress):.1f}%)",
            f"loss {self._smooth / self._weight:.4f}", f"grad {grad_norm:.3f}",
            f"lr x{lr_mult:.3f}" if lr_mult != 1 else "",
            f"{1000 * dt:.0f} ms" if dt else "compiled", f"{metrics.short(speed)} tok/s" if speed else "",
            f"mfu {mfu:.1%}" if mfu else "mfu n/a", f"{metrics.short(self.run.totals['tokens'])} tokens", _place(info),
            f"waste {info['waste']:.1%}",
            f"skipped {info['skipped']:,}" if info.get("skipped") else "",
            f"wait {1000 * waited:.0f} ms", f"eta {self._eta(step, progress)}",
        ]  # fmt: skip
        print(" | ".join(p for p in parts if p), flush=True)

    def _eta(self, step: int, progress: float) -> str:
        if not self._steps_timed:
            return "n/a"
        left = self.stage.steps - step if self.stage.steps else step * (1 - progress) / max(progress, 1e-6)
        return metrics.clock(left * self._seconds_timed / self._steps_timed)


def _place(info: dict) -> str:
    """Where the loader reads: the row group, of conversations the epochs alone."""
    if info.get("shard") is None:
        return f"epoch {info['progress']:.2f}"
    return f"epoch {info['epoch']} shard {info['shard']} group {info['row_group']}"


# -----------------------------------------------------------------------------
# From time to time


@dataclass(frozen=True)
class Evaluation:
    """Something to do every so many steps and at the end. `risky` ones (they load data, they generate) are preceded by
    a checkpoint, the others where this process has not done them before: then they have shown that they work, and
    checkpoints so often would cost more than they save. every < 1: never, or at the end alone where `at_end`."""

    run: Callable[[Run, Stage, int], None]
    every: int
    risky: bool = True
    at_start: bool = False
    at_end: bool = False

    def due(self, step: int, last: bool) -> bool:
        if self.every < 1:
            return self.at_end and last
        return last or (step % self.every == 0 and (step > 0 or self.at_start))


def evaluations_of(cfg: Train) -> list[Evaluation]:
    """Validation loss in every stage, CORE and samples in pretraining, tasks in finetuning."""
    all_stages = [Evaluation(validate, cfg.eval_every, risky=False, at_start=True, at_end=True)]
    if cfg.stage == "base":
        return [*all_stages, Evaluation(core_metric, cfg.core_metric_every), Evaluation(sample, cfg.sample_every)]
    if cfg.stage == "sft" and cfg.eval_metrics_every > 0:
        judge = functools.partial(task_metrics, judged=judged_tasks(cfg))
        return [*all_stages, Evaluation(judge, cfg.eval_metrics_every)]
    return all_stages


def judged_tasks(cfg: config.Sft) -> list[tasks.Task]:
    """The tasks of --eval_metrics_tasks, loaded before the first step: what is wrong with them is said then."""
    loaded = [tasks.load(name, "val", data_dir=cfg.task_data_dir) for name in cfg.eval_metrics_tasks.split("|")]
    for task in loaded:
        if task.eval_type is None:
            raise UserError(f"--eval_metrics_tasks: {task.name} is only for training, its answers cannot be judged")
    return loaded


def validate(run: Run, stage: Stage, step: int) -> None:
    from nanochat_jax.evals.bpb import bits_per_byte

    batches = stage.validation()
    bpb = bits_per_byte(run.state.params, run.model, batches, run.tokenizer.token_bytes(), run.dtype)
    batches.close()
    run.log("val", step, bpb=bpb)
    print(f"step {step} | validation bits per byte {bpb:.6f}", flush=True)


def core_metric(run: Run, stage: Stage, step: int) -> None:
    from nanochat_jax.evals import core

    try:
        bundle = Path(parallel.first(lambda: str(core.find_bundle(run.cfg.core_dir))))
    except UserError as error:
        print(f"step {step} | CORE skipped: {error}")
        return
    result = core.evaluate(
        run.state.params, run.model, run.tokenizer, bundle, max_per_task=run.cfg.core_metric_max_per_task,
        dtype=run.dtype,
    )  # fmt: skip
    run.log("core", step, core=result.core, stderr=result.stderr, n=result.n)
    print(f"step {step} | CORE {result.core:.4f}", flush=True)


def sample(run: Run, stage: Stage, step: int) -> None:
    """What the model makes of seven prompts, greedily."""
    for prompt, text in complete(run.state.params, run.model, run.tokenizer, run.dtype):
        run.log("sample", step, task=prompt, text=text)
        print(f"  {prompt}{text!r}")


def complete(params, model: GPTConfig, tokenizer, dtype, new_tokens: int = 16) -> list[tuple[str, str]]:
    """Greedy continuations of SAMPLE_PROMPTS, as (prompt, continuation)."""
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request

    engine = Engine(params, model, tokenizer, slots=len(SAMPLE_PROMPTS), dtype=dtype)
    requests = [
        Request(ids=tokenizer.encode(p, prepend=tokenizer.bos), max_tokens=new_tokens, temperature=0.0)
        for p in SAMPLE_PROMPTS
    ]
    answers = engine.run(requests)
    engine.close()
    return [(p, tokenizer.decode(a[0].ids)) for p, a in zip(SAMPLE_PROMPTS, answers, strict=True)]


def task_metrics(run: Run, stage: Stage, step: int, judged: list[tasks.Task]) -> None:
    from nanochat_jax.evals import chat

    for task in judged:
        score = chat.evaluate(
            run.state.params, run.model, run.tokenizer, task, max_problems=run.cfg.eval_metrics_max_problems,
            dtype=run.dtype,
        )  # fmt: skip
        run.log(
            "eval", step, task=score.task, suite="chat", split=task.split, score=score.score, stderr=score.stderr,
            n=score.n,
        )  # fmt: skip
        print(f"step {step} | {score.task} {score.score:.4f} ± {score.stderr:.4f} (n={score.n})", flush=True)
