"""The loop that pretraining, midtraining and finetuning share.

The three stages differ in where rows come from and in how the learning rate falls; the rest is one story: fetch a
batch, step, log the step before (so that the device never waits for the host), and from time to time save, validate,
evaluate and sample. Saving comes before evaluating, so that no evaluation can cost a run its weights; and when text or
an evaluation fails with an error, a run in one process saves its state before it ends.
"""

import math
import signal
from contextlib import ExitStack, nullcontext

import jax
import jax.numpy as jnp

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.progress import Timer, clock, short
from nanochat_jax.training import optim
from nanochat_jax.training.interruption import Interruption
from nanochat_jax.training.run import Run, open_run, out_of_memory_in_step, step_of
from nanochat_jax.training.stages import Stage, base_stage, chat_stage
from nanochat_jax.training.validation import Evaluation, evaluations_of

LESS_JUDGED = "turn off what is judged, with -1 for --core_metric_every, --sample_every or --eval_metrics_every"


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
        held.enter_context(out_of_memory_in_step(stage.batch_shape.rows))  # which is told a step late

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
                run.saver.wait_all()
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
                run.saver.wait_all()
                print(f"saved at step {step}: the same command goes on from here")
                raise SystemExit(128 + stop)
            if due:
                log.flush()
                if risky:  # it may take the process with it: the checkpoint is to be there, not on its way
                    run.saver.wait_all()
                for evaluation in due:
                    try:
                        with devices.out_of_memory_explained("an evaluation", LESS_JUDGED):
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
            arrays = stage.batch_shape.shaped(batch, run.layout.mesh, run.model_cfg.vocab_size)
            if jax.process_count() > 1:  # all stop after the same step: where its results, with all wishes, are read
                wish = interruption.signal is not None or run.saver.failed
                arrays["stop"] = sharding.put_flag(run.layout.mesh, wish)
            run.state, results = step_fn(run.state, arrays, jnp.float32(lr_mult))
            step += 1
            run.saver.raise_if_failed()
            log.push(step, results, lr_mult, waited, progress)
        stage.loader.close()
        run.finish(step)
        print(f"{cfg.stage}: done, {step} steps in {clock(run.totals['seconds'])} (compilation left out)")


def _progress(run: Run, stage: Stage) -> float:
    return stage.loader.info["progress"] / (1 if run.cfg.stage == "mid" else run.cfg.num_epochs)


def announce(run: Run, stage: Stage) -> None:
    """Everything derived, before the first step."""
    g, model_cfg = stage.batch_shape, run.model_cfg
    epochs = getattr(run.cfg, "num_epochs", 1)  # midtraining has one
    passes = "one pass over the data" if epochs == 1 else f"{epochs} passes over the data"
    facts = {
        "model": f"{model_cfg.n_layer} layers, width {model_cfg.n_embd}, {model_cfg.n_head} heads "
        f"({model_cfg.n_kv_head} kv), vocabulary {model_cfg.vocab_size:,}, context {model_cfg.sequence_len}",
        "parameters": f"{model_cfg.num_params:,}",
        "FLOPs a token": f"{model_cfg.flops_per_token:.3e}",
        "batch": f"{g.tokens:,} tokens = {g} x {g.seq_len}" + (f", less {g.padding} empty rows" if g.padding else ""),
        "mesh": sharding.describe(run.layout.mesh),
        "steps": f"{stage.steps} ({stage.steps * g.tokens:,} tokens)" if stage.steps else passes,
        **stage.facts,
    }
    if stage.steps:
        flops = stage.steps * g.tokens * model_cfg.flops_per_token
        seconds = devices.expected_seconds(flops)
        facts["total FLOPs"] = f"{flops:.3e}"
        unknown = "n/a: this device's peak is not known; see the eta below"
        facts["expected time"] = f"{clock(seconds)} at an MFU of 50%" if seconds else unknown
    for name, value in facts.items():
        print(f"  {name}: {value}")
    print("compiling the first step ...", flush=True)


class StepLog:
    """Logs each step one step late, prints a line every few seconds, and stops a run whose loss is not finite."""

    def __init__(self, run: Run, stage: Stage, print_every: float = 5.0):
        self.run, self.stage, self.print_every = run, stage, print_every
        self.timer, self.peak = Timer(), devices.peak_flops()
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
        tokens = self.stage.batch_shape.tokens
        flops = tokens * self.run.model_cfg.flops_per_token
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
            f"{1000 * dt:.0f} ms" if dt else "compiled", f"{short(speed)} tok/s" if speed else "",
            f"mfu {mfu:.1%}" if mfu else "mfu n/a", f"{short(self.run.totals['tokens'])} tokens", _place(info),
            f"waste {info['waste']:.1%}",
            f"skipped {info['skipped']:,}" if info.get("skipped") else "",
            f"wait {1000 * waited:.0f} ms", f"eta {self._eta(step, progress)}",
        ]  # fmt: skip
        print(" | ".join(p for p in parts if p), flush=True)

    def _eta(self, step: int, progress: float) -> str:
        if not self._steps_timed:
            return "n/a"
        left = self.stage.steps - step if self.stage.steps else step * (1 - progress) / max(progress, 1e-6)
        return clock(left * self._seconds_timed / self._steps_timed)


def _place(info: dict) -> str:
    """Where the loader reads: the row group, of conversations the epochs alone."""
    if info.get("shard") is None:
        return f"epoch {info['progress']:.2f}"
    return f"epoch {info['epoch']} shard {info['shard']} group {info['row_group']}"
