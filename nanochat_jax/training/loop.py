"""The training loop of pretraining, midtraining and finetuning.

These three stages differ in their data and learning-rate schedules (stages.py). In each iteration, the loop fetches a
batch, dispatches a step and logs the previous step. It also saves and evaluates when due. Each step is logged one step
late, so that the device never waits for the host. If a batch cannot be read or an evaluation fails, the error ends the
run. A run with a single process saves its state before it ends.
"""

import enum
import signal
from typing import NamedTuple

import jax

from nanochat_jax import config
from nanochat_jax.data import dataloader
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.progress import Timer, clock, say, short
from nanochat_jax.training import optim
from nanochat_jax.training.announce import announce, cost
from nanochat_jax.training.garbage import HeldOffGarbage
from nanochat_jax.training.interruption import Interruption, StopRequested
from nanochat_jax.training.run import Run, check_finite, no_implicit_transfers, open_run, out_of_memory_in_step, step_of
from nanochat_jax.training.run_control import RunControl
from nanochat_jax.training.stages import Stage, base_stage, chat_stage
from nanochat_jax.training.step import StepMetrics
from nanochat_jax.training.validation import evaluations_of

PRINT_EVERY = 5.0  # seconds between printed steps


def train(cfg: config.Base | config.Mid | config.Sft) -> None:
    """Trains one stage to its end. Starts at step 0, or resumes from a checkpoint."""
    momentum = 0.95 if cfg.stage == "sft" else optim.momentum_warmup
    with open_run(cfg, momentum) as run:
        if run is None:  # the run is already finished
            return
        stage = base_stage(run, cfg) if isinstance(cfg, config.Base) else chat_stage(run, cfg)
        run.load_state()
        if run.data is not None:
            stage.loader.restore(run.data)
        evaluations = evaluations_of(run, stage, cfg)
        check_validation(stage)
        step_fn = step_of(run)
        announce(run, stage.batch_shape, describe_steps(stage), stage.facts | cost_of(run, stage))
        if cfg.dry_run:
            stage.loader.close()
            return
        run.begin()

        # Up to this point, a stop signal ends the process at once, because there is no new state to save. An error in a
        # step is raised one step late, when the metrics are read, so `out_of_memory_in_step` covers the whole loop.
        with Interruption() as interruption, HeldOffGarbage() as garbage, out_of_memory_in_step(stage.batch_shape.rows):
            log = StepLog(run, stage, interruption)
            control = RunControl(run, evaluations, stage.loader.state(), interruption, log.timer, log.flush)
            data_ended = False
            while True:
                last = data_ended or control.step == stage.steps

                # Do what is due: save, stop, evaluate.
                control.between_steps(last)
                garbage.between_steps()
                if last:
                    break

                batch = next_batch(stage.loader, interruption, control)
                if batch is NoBatch.END:
                    data_ended = True  # the next iteration saves, evaluates and leaves the loop
                    continue
                if batch is NoBatch.STOP:
                    continue

                # ---------------------------------------------------------------------
                # Dispatch one optimizer step, without waiting for its results.
                lr_mult = stage.lr_mult(control.step)
                waited = log.timer.lap() if log.timed else 0.0
                arrays = stage.batch_shape.shaped(batch, run.layout.mesh, run.model_cfg.vocab_size)
                if jax.process_count() > 1:  # all processes must stop after the same step (interruption.py)
                    stop_requested = interruption.received is not None or run.saver.failed
                    arrays["stop"] = sharding.put_flag(run.layout.mesh, stop_requested)
                lr = run.put_scalar(lr_mult)
                with no_implicit_transfers():
                    run.state, results = step_fn(run.state, arrays, lr)
                control.step += 1
                # ---------------------------------------------------------------------

                run.saver.raise_if_failed()
                log.push(control.step, results, lr_mult, waited)  # logs the previous step
            truncated = stage.describe_truncated()
            stage.loader.close()
            run.finish(control.step)
            if truncated:
                print(f"{cfg.stage}: {truncated}")
            print(f"{cfg.stage}: done, {run.describe_time(control.step)}")


def check_validation(stage: Stage) -> None:
    """Reads a batch of held-out data, so that errors in the data appear before the run's folder is changed."""
    batches = stage.validation()
    next(batches, None)
    batches.close()


class NoBatch(enum.Enum):
    """Why `next_batch` returned no batch."""

    END = enum.auto()  # there is no more data
    STOP = enum.auto()  # a stop signal ended the wait for the batch


def next_batch(
    loader: dataloader.Loader, interruption: Interruption, control: RunControl
) -> dataloader.Batch | NoBatch:  # fmt: skip
    """Returns this process's rows of the next batch, and sets `control.place` to the position after the batch.

    If reading fails, calls `control.rescue` and raises the error again.
    """
    # A stop signal ends the wait for a batch, since a shard may take an hour to arrive. With several processes, the
    # wait goes on, since no process may stop alone.
    try:
        with interruption.raise_at_signal():
            batch, place = next(loader), loader.state()
    except StopIteration:
        return NoBatch.END
    except (StopRequested, Exception):
        if interruption.raised:
            return NoBatch.STOP
        control.rescue()
        raise
    control.place = place  # set only if the batch will be trained on
    return batch


def describe_steps(stage: Stage) -> str:
    """Returns the number of steps and tokens, or an estimate if the run ends when its data ends."""
    if stage.steps:
        return f"{stage.steps:,} ({stage.steps * stage.batch_shape.tokens:,} tokens)"
    passes = "one pass" if stage.epochs == 1 else f"{stage.epochs} passes"
    return f"about {stage.expected_steps:,.0f} ({passes} over the data)"


def cost_of(run: Run, stage: Stage) -> dict[str, str]:
    """Returns the total FLOPs and the expected time of a stage."""
    tokens = stage.expected_steps * stage.batch_shape.tokens
    return cost(run.model_cfg, tokens, about="" if stage.steps else "about ")


class DispatchedStep(NamedTuple):
    """A step that has been dispatched but not yet logged."""

    step: int
    results: StepMetrics  # on the device; reading a value waits for the step to end
    lr_mult: float
    waited: float  # seconds spent waiting for the batch
    info: dict  # what the loader reported about the batch


class StepLog:
    """Logs each step one step late, and prints a line every few seconds."""

    def __init__(self, run: Run, stage: Stage, interruption: Interruption):
        self.run, self.stage, self.interruption = run, stage, interruption
        self.timer, self.peak = Timer(), devices.peak_flops()
        self.timed = False  # false for the first step, since its time includes compilation
        self._pending: DispatchedStep | None = None
        self._smooth_loss, self._weight = 0.0, 0.0
        self._since_print = Timer()
        self._steps_timed, self._seconds_timed = 0, 0.0

    def push(self, step: int, results: StepMetrics, lr_mult: float, waited: float) -> None:
        """Logs the previous step, and keeps this step pending until the next call."""
        info = dict(self.stage.loader.info)
        self.flush()
        self._pending = DispatchedStep(step, results, lr_mult, waited, info)

    def flush(self) -> None:
        """Waits for the pending step and logs it. Raises UserError if its loss or gradient norm is not finite."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step, results = pending.step, pending.results
        loss, grad_norm = float(results.loss), float(results.grad_norm)
        if results.stop is not None and results.stop > 0:
            self.interruption.agreed = signal.SIGTERM
        elapsed = self.timer.lap() + pending.waited
        dt = elapsed if self.timed else None
        self.timed = True
        check_finite(self.run, step, loss, grad_norm)
        tokens = self.stage.batch_shape.tokens
        flops = tokens * self.run.model_cfg.flops_per_token
        totals = self.run.totals
        totals["tokens"] += tokens
        totals["flops"] += flops
        if dt is not None:
            self.run.count_time(step, dt)
            self._steps_timed += 1
            self._seconds_timed += dt
        self._smooth_loss, self._weight = 0.9 * self._smooth_loss + 0.1 * loss, 0.9 * self._weight + 0.1
        speed = tokens / dt if dt else None
        mfu = flops / dt / self.peak if dt and self.peak else None
        info = {k: pending.info.get(k) for k in ("epoch", "shard", "row_group", "waste", "skipped", "truncated")}
        self.run.log(
            "train", step, loss=loss, lr_mult=pending.lr_mult, grad_norm=grad_norm, dt=dt, tok_per_s=speed, mfu=mfu,
            loader_wait=pending.waited, counted=int(results.count), **info,
        )  # fmt: skip
        if step in (1, self.stage.steps) or self._since_print.lap_if_passed(PRINT_EVERY):
            self._print(pending, grad_norm, dt, speed, mfu)

    def _print(
        self, done: DispatchedStep, grad_norm: float, dt: float | None, speed: float | None, mfu: float | None
    ) -> None:
        """Prints one line about a step. In this line, "wait" is the time spent waiting for the batch."""
        step, total, info = done.step, self.stage.steps, done.info
        progress = step / total if total else info["progress"] / self.stage.epochs  # from 0 to 1
        parts = [
            f"step {step}" + (f"/{total}" if total else "") + f" ({progress:.1%})",
            f"loss {self._smooth_loss / self._weight:.4f}",
            f"grad {grad_norm:.3f}",
            f"lr x{done.lr_mult:.3f}" if done.lr_mult != 1 else "",
            f"{1000 * dt:.0f} ms" if dt else "compiled",
            f"{short(speed)} tok/s" if speed else "",
            f"mfu {mfu:.1%}" if mfu else "mfu n/a",
            f"{short(self.run.totals['tokens'])} tokens",
            f"total {self.run.totals['seconds'] / 60:.2f}m",
            _place(info),
            f"waste {info['waste']:.1%}",
            f"truncated {info['truncated']:,}" if info.get("truncated") else "",
            f"skipped {info['skipped']:,}" if info.get("skipped") else "",
            f"wait {1000 * done.waited:.0f} ms",
            f"eta {self._eta(step, progress)}",
        ]
        say(" | ".join(p for p in parts if p))

    def _eta(self, step: int, progress: float) -> str:
        if not self._steps_timed:
            return "n/a"
        left = step * (1 - progress) / max(progress, 1e-6)
        return clock(left * self._seconds_timed / self._steps_timed)


def _place(info: dict) -> str:
    """Returns the position in the data: "epoch 0 shard 112 group 45" for text, "epoch 0.25" for conversations."""
    if info.get("shard") is None:
        return f"epoch {info['progress']:.2f}"
    return f"epoch {info['epoch']} shard {info['shard']} group {info['row_group']}"
