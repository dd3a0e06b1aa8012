"""Reinforcement learning on a task whose answers can be checked.

The method is REINFORCE with a group baseline, nanochat's simplification of GRPO. For each problem, a group of answers
is sampled. The advantage of a token is the reward of its answer minus the mean reward of the group. Training maximizes
the log-likelihood of the sampled tokens, weighted by their advantages and divided by the number of tokens. Training is
on-policy: each batch of answers is used for only one update. There is no reference model and no clipped probability
ratio.

This module differs from the original nanochat in two ways. First, the token that ends an answer is a training target,
so that the model learns to stop. Second, with --oversampling=K, a step samples answers to K times as many problems as
it trains on. For training, groups with unequal rewards are chosen first. A group with equal rewards teaches nothing,
because its advantages are all 0.
"""

import math
from dataclasses import dataclass

import jax
import numpy as np

from nanochat_jax import config, tasks
from nanochat_jax.config import UserError
from nanochat_jax.engine.cache import bucket
from nanochat_jax.engine.engine import Engine
from nanochat_jax.evals.score import list_notes, mean_and_stderr, with_error
from nanochat_jax.model import attention
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.progress import Timer, clock, count_of, say
from nanochat_jax.tokenizer import SHORTEST_PROMPT
from nanochat_jax.training import optim
from nanochat_jax.training.announce import announce, cost
from nanochat_jax.training.batch_shape import BatchShape
from nanochat_jax.training.garbage import HeldOffGarbage
from nanochat_jax.training.interruption import Interruption, StopRequested
from nanochat_jax.training.passes import describe_epochs
from nanochat_jax.training.pins import pin_tasks
from nanochat_jax.training.rollouts import (
    Rollout,
    answer,
    as_batch,
    derive_seed,
    problems_of,
    sample_rollouts,
    select_informative,
    split_groups,
)
from nanochat_jax.training.run import Run, check_finite, no_implicit_transfers, open_run, out_of_memory_in_step, step_of
from nanochat_jax.training.run_control import Evaluation, RunControl
from nanochat_jax.training.step import StepMetrics

SLOTS = 64  # the maximum number of answers that a device generates at once
SHORTEST = 64  # the minimum length of a row in tokens; shorter rows are padded
PROBLEMS_TO_MEASURE = 100  # number of problems from which the mean length of a prompt is estimated
FEWER_ANSWERS = "lower --num_samples, --examples_per_step or --max_new_tokens"


def train(cfg: config.Rl) -> None:
    """Trains the rl stage to its end. Starts at step 0, or resumes from a checkpoint."""
    with open_run(cfg, momentum=0.95) as run:
        if run is None:  # the run is already finished
            return
        stage = rl_stage(run, cfg)
        run.load_state()
        step_fn = step_of(run)
        announce(run, stage.batch_shape, f"{stage.steps:,}", facts_of(run, cfg, stage))
        if cfg.dry_run:
            return

        # Up to this point, a stop signal ends the process at once, because there is no new state to save.
        with (
            Interruption() as interruption,
            HeldOffGarbage() as garbage,
            devices.out_of_memory_explained("the answers", FEWER_ANSWERS),
        ):
            slots = min(stage.drawn * cfg.num_samples, SLOTS * jax.device_count())  # a multiple of the device count
            engine = Engine(run.state.params, run.model_cfg, run.tokenizer, slots=slots, dtype=run.dtype)
            run.begin()

            def evaluate_answers(step: int) -> None:
                engine.set_params(run.state.params)
                evaluate(run, cfg, engine, stage.held_out, step)

            log = RolloutLog(run, cfg, stage.steps)
            evaluations = [Evaluation(evaluate_answers, cfg.eval_every, at_start=True)]
            place = {"step": run.step}
            control = RunControl(run, evaluations, place, interruption, log.timer, flush=lambda: None)
            while True:
                last = control.step >= stage.steps

                # Do what is due: save, stop, evaluate.
                control.between_steps(last)
                garbage.between_steps()
                if last:
                    break

                # Sample answers. `set_params` also clears the prefix cache, so that an earlier evaluation cannot affect
                # the answers.
                engine.set_params(run.state.params)
                indices = problems_of(control.step, len(stage.task), stage.drawn, cfg.seed)
                seed = derive_seed(cfg.seed, control.step)
                try:
                    with interruption.raise_at_signal():
                        sampled = sample_rollouts(engine, run.tokenizer, stage.task, indices, cfg, seed)
                except (StopRequested, Exception):
                    if not interruption.raised:
                        raise
                    continue  # the next iteration saves and exits
                chosen = select_informative(sampled, cfg.examples_per_step, cfg.num_samples)
                sampling_seconds = log.timer.lap()

                # ---------------------------------------------------------------------
                # One optimizer step
                lr_mult = cfg.init_lr_frac * optim.linear_decay(control.step / stage.steps)
                with out_of_memory_in_step(stage.batch_shape.rows):
                    results = update(run, step_fn, control.step + 1, chosen, stage.batch_shape, lr_mult)
                control.step += 1
                control.place = {"step": control.step}
                # ---------------------------------------------------------------------

                run.saver.raise_if_failed()
                log.push(control.step, sampled, results, lr_mult, sampling_seconds)
            engine.close()
            run.finish(control.step)
            print(f"rl: done, {run.describe_time(control.step)}")


# -----------------------------------------------------------------------------
# The stage


@dataclass(frozen=True)
class RlStage:
    """The problems, batch shape and number of steps of a run."""

    batch_shape: BatchShape
    task: tasks.Mixture  # the problems to train on
    held_out: tasks.Mixture  # the problems to evaluate on
    drawn: int  # the number of problems that the model answers in each step
    steps: int


def rl_stage(run: Run, cfg: config.Rl) -> RlStage:
    """Prepares the problems, batch shape and number of steps of a run. Raises UserError if the settings are invalid."""
    if jax.process_count() > 1:
        raise UserError("--stage=rl runs in one process, on all devices of one host: leave out --coordinator")
    if cfg.max_new_tokens > run.model_cfg.sequence_len - SHORTEST_PROMPT:
        raise UserError(
            f"--max_new_tokens={cfg.max_new_tokens}: the context has {run.model_cfg.sequence_len} tokens, "
            f"prompts included: try {run.model_cfg.sequence_len // 2}"
        )
    attention.check_rows(cfg.device_batch_size, run.model_cfg)
    batch_shape = shape_for_answers(
        cfg, jax.device_count(), sharding.replicas(run.layout.mesh), run.model_cfg.sequence_len
    )
    for name in cfg.mixture:
        if tasks.task_class(name).eval_type != "generative":
            raise UserError(f"--mixture: {name} has no answers that can be generated and checked: try gsm8k=0")
    task = tasks.mixture(cfg.mixture, "train", cfg.task_data_dir, task_files=cfg.task_files)
    held_out = tasks.mixture(dict.fromkeys(cfg.mixture, 0), "val", cfg.task_data_dir, task_files=cfg.task_files)
    drawn = cfg.examples_per_step * cfg.oversampling
    if drawn > len(task):  # a problem drawn twice in one step would get the same answers twice
        unit = examples_unit(cfg, math.lcm(jax.device_count(), batch_shape.replicas * batch_shape.rows))
        most = len(task) // cfg.oversampling // unit * unit
        fewer = f"try --examples_per_step={most}" if most else "lower --oversampling, or add problems to --mixture"
        raise UserError(
            f"--examples_per_step={cfg.examples_per_step} x --oversampling={cfg.oversampling} asks for {drawn} "
            f"problems per step, but the mixture has only {len(task)}: {fewer}"
        )
    pin_tasks(run, task)
    steps = cfg.num_iterations if cfg.num_iterations > 0 else len(task) * cfg.num_epochs // drawn
    return RlStage(batch_shape, task, held_out, drawn, steps)


def shape_for_answers(cfg: config.Rl, count: int, replicas: int, seq_len: int) -> BatchShape:
    """Returns the batch shape of a step with one row per answer. `count` is the number of devices.

    Raises UserError unless the answers divide evenly over the devices, and each replica's answers divide evenly into
    micro-batches.
    """
    answers = cfg.examples_per_step * cfg.num_samples
    flags = f"--examples_per_step={cfg.examples_per_step} x --num_samples={cfg.num_samples}"
    if answers % count:
        unit = examples_unit(cfg, count)
        more = math.ceil(cfg.examples_per_step / unit) * unit
        raise UserError(
            f"{flags} answers do not divide over {count_of(count, 'device')}: try --examples_per_step={more}"
        )
    share, rows = answers // replicas, cfg.device_batch_size
    if share % rows:
        raise UserError(
            f"--device_batch_size={rows} does not divide the {share} answers per replica "
            f"({flags} / {count_of(replicas, 'replica')}): try {math.gcd(share, max(1, rows))}"
        )
    return BatchShape(share // rows, rows, replicas, seq_len)


def examples_unit(cfg: config.Rl, answers: int) -> int:
    """Returns the smallest --examples_per_step for which the number of answers in a step is divisible by `answers`."""
    return answers // math.gcd(answers, cfg.num_samples)


def facts_of(run: Run, cfg: config.Rl, stage: RlStage) -> dict[str, str]:
    """Returns facts about a run, for `announce.announce`.

    The FLOPs are an upper limit, since they assume that each answer has --max_new_tokens tokens. The expected time does
    not include sampling, because the time of sampling cannot be computed from the peak FLOP/s.
    """
    some = [stage.task[i] for i in range(min(PROBLEMS_TO_MEASURE, len(stage.task)))]
    prompt = sum(len(run.tokenizer.render_for_completion(problem)) for problem in some) / len(some)
    length = min(prompt + cfg.max_new_tokens, run.model_cfg.sequence_len)
    tokens = stage.steps * cfg.examples_per_step * cfg.num_samples * length
    facts = {
        "task": f"{', '.join(cfg.mixture)}, {count_of(len(stage.task), 'problem')}; {stage.drawn} per step, "
        f"{count_of(cfg.num_samples, 'answer')} each, {cfg.examples_per_step} to train on",
        # There is no limit as in finetuning: the answers to a problem are new in every pass.
        "epochs": describe_epochs(stage.steps * stage.drawn / len(stage.task), cfg),
    }
    if cfg.eval_every > 0:
        count, total = min(cfg.eval_examples, len(stage.held_out)), len(stage.held_out)
        splits = ", ".join(f"{part.name} {part.split}" for part in stage.held_out.tasks)
        answers = count_of(cfg.eval_samples, "answer")
        facts["pass@k"] = f"{count:,} of {count_of(total, 'problem')} ({splits}), {answers} each"
    more = "; sampling the answers takes longer than training"
    return facts | cost(run.model_cfg, tokens, about="at most ", more=more)


# -----------------------------------------------------------------------------
# A step


def update(
    run: Run, step_fn: jax.stages.Wrapped, step: int, rollouts: list[Rollout], batch_shape: BatchShape, lr_mult: float
) -> StepMetrics:
    """Takes one policy-gradient step on the rollouts, and stores the new state in `run`. The first step is step 1.

    Raises UserError if the loss or the gradient norm is not finite.
    """
    longest = max(len(r.prompt) + len(r.sample.ids) for r in rollouts)
    # Round the length up to one of a few lengths, because the step is compiled again for each length.
    length = bucket(longest - 1, run.model_cfg.sequence_len, SHORTEST)
    batch = as_batch(rollouts, length, run.tokenizer.special("<|assistant_end|>"))
    arrays = batch_shape.shaped(batch, run.layout.mesh, run.model_cfg.vocab_size)
    lr = run.put_scalar(lr_mult)
    with no_implicit_transfers():
        run.state, results = step_fn(run.state, arrays, lr)
    loss, grad_norm = float(results.loss), float(results.grad_norm)  # waits for the step to end
    check_finite(run, step, loss, grad_norm)
    run.totals["tokens"] += len(rollouts) * length
    run.totals["flops"] += len(rollouts) * length * run.model_cfg.flops_per_token
    return results


class RolloutLog:
    """Logs each step as soon as it is done.

    Logging one step late, as loop.py does, would save no time here. The next answers need the new weights, so sampling
    has to wait for the step anyway.
    """

    def __init__(self, run: Run, cfg: config.Rl, steps: int):
        self.run, self.cfg, self.steps = run, cfg, steps
        self.timer = Timer()
        self._seconds: list[float] = []  # the time of each step except the first, which includes compilation

    def push(
        self, step: int, sampled: list[Rollout], results: StepMetrics, lr_mult: float, sampling_seconds: float
    ) -> None:
        """Logs one step. `sampled` includes the answers that the step did not train on."""
        training_seconds = self.timer.lap()
        dt = None
        if step > self.run.step + 1:
            dt = sampling_seconds + training_seconds
            self._seconds.append(dt)
            self.run.count_time(step, dt)
        eta = clock((self.steps - step) * float(np.mean(self._seconds))) if self._seconds else "n/a"

        groups = split_groups(sampled, self.cfg.num_samples)
        reward = float(np.mean([r.reward for r in sampled]))
        # The answers to one problem are not independent, so the standard error is computed from one mean per problem.
        _, stderr = mean_and_stderr([float(np.mean([r.reward for r in group])) for group in groups])
        rewarded, other_format = (sum(x) for x in zip(*((r.reward > 0, r.other_format) for r in sampled), strict=True))
        cut = sum(group[0].cut for group in groups)
        length = float(np.mean([len(r.sample.ids) for r in sampled]))
        zero_advantage = float(np.mean([all(r.advantage == 0 for r in group) for group in groups]))
        at_limit = sum(r.sample.finish_reason == "length" for r in sampled)
        self.run.log(
            "train", step, loss=float(results.loss), grad_norm=float(results.grad_norm), lr_mult=lr_mult, dt=dt,
            reward=reward, stderr=stderr, n=len(groups), rewarded=rewarded, other_format=other_format, cut=cut,
            sequence_length=length, zero_advantage=zero_advantage, truncated=at_limit / len(sampled),
            sampling_seconds=sampling_seconds,
        )  # fmt: skip
        mean = with_error(reward, stderr, f"n={len(groups)} problems", digits=3)
        among = f" ({other_format} of them in another format)" if other_format else ""
        notes = list_notes(cut, len(groups), at_limit, len(sampled))
        say(
            f"step {step}/{self.steps} ({100 * step / self.steps:.1f}%) | reward {mean}, "
            f"{rewarded} of {len(sampled)} answers right{among} | "
            f"{zero_advantage:.0%} of problems without advantage | length {length:.0f} | "
            + "".join(f"{note} | " for note in notes)
            + f"lr x{lr_mult:.4f} | "
            f"sampling {sampling_seconds:.1f} s, training {training_seconds:.1f} s | "
            f"total {self.run.totals['seconds'] / 60:.2f}m | eta {eta}"
        )


def evaluate(run: Run, cfg: config.Rl, engine: Engine, task: tasks.Mixture, step: int) -> None:
    """Logs pass@k, the probability that at least one of k answers to a held-out problem is right."""
    count = min(cfg.eval_examples, len(task))
    problems = [task[i] for i in range(count)]
    seeds = [derive_seed(cfg.seed, 1, i) for i in range(count)]
    prompts, groups = answer(engine, run.tokenizer, problems, cfg, cfg.eval_samples, seeds)
    right = [
        sum(task.evaluate(problem, run.tokenizer.decode(sample.content)) for sample in group)
        for problem, group in zip(problems, groups, strict=True)
    ]
    answers = [sample for group in groups for sample in group]
    at_limit, cut = sum(sample.finish_reason == "length" for sample in answers), sum(was_cut for _, was_cut in prompts)
    passed, fields = {}, {}
    for k in range(1, cfg.eval_samples + 1):
        score, stderr = passed[k] = mean_and_stderr([pass_at_k(cfg.eval_samples, c, k) for c in right])
        fields |= {f"pass@{k}": score, f"pass@{k}_stderr": stderr}
    run.log("val", step, n=count, truncated=at_limit / len(answers), cut=cut, **fields)
    shown = [f"pass@{k} {with_error(*passed[k], digits=3)}" for k in (1, 4, 8) if k in passed]
    notes = list_notes(cut, count, at_limit, len(answers))
    print(f"step {step} | {'|'.join(cfg.mixture)}: {', '.join([*shown, f'n={count:,} problems', *notes])}", flush=True)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the probability that at least one of `k` answers is right.

    The k answers are drawn at random from `n` answers. `right` is the number of right answers among the n.

    This is the unbiased estimator of Chen et al., 2021 (arXiv:2107.03374). The original nanochat uses only the first k
    of the n answers. Its estimate has the same mean and a larger error.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
