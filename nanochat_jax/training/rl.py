"""Reinforcement learning on a task whose answers can be checked: rollouts, rewards, the policy-gradient step.

REINFORCE with a group baseline, nanochat's simplification of GRPO: sample a group of answers to each problem, take
reward minus the group's mean as the advantage of every token of an answer, and ascend the advantage-weighted
log-likelihood, normalised by the number of tokens. On policy, one update a batch: no reference model, no ratio to clip.

Unlike the specification, the token that ends an answer is trained on, so that stopping is learnt as well. And a group
of which all answers are right, or all are wrong, teaches nothing: with --oversampling=K answers to K times as many
problems are sampled, and the groups that do teach something are trained on first.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import config, tasks
from nanochat_jax.config import UserError
from nanochat_jax.engine.cache import bucket
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.progress import Timer, clock
from nanochat_jax.tokenizer import SHORTEST_PROMPT
from nanochat_jax.training import optim
from nanochat_jax.training.batch_shape import BatchShape
from nanochat_jax.training.interruption import Interruption
from nanochat_jax.training.run import Run, open_run, out_of_memory_in_step, step_of
from nanochat_jax.training.stages import pin_tasks

SLOTS = 64  # answers a device generates at once
SHORTEST = 64  # tokens; rows of shorter answers are padded to it

# -----------------------------------------------------------------------------
# Rollouts


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: the prompt's ids, the answer's, which of them were sampled (1) or forced (0), its reward."""

    prompt: list[int]
    sample: Sample
    reward: float
    advantage: float


def rollouts(engine: Engine, tokenizer, task, indices: list[int], cfg: config.Rl, seed: int) -> list[Rollout]:
    """`num_samples` answers to each of the problems, rewarded and compared within their group."""
    problems = [task[i] for i in indices]
    room = engine.model_cfg.sequence_len - cfg.max_new_tokens
    prompts = [tokenizer.render_for_completion(p, max_tokens=room) for p in problems]
    requests = [
        Request(
            ids=prompt, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k,
            n=cfg.num_samples, seed=_seed(seed, i),
        )
        for i, prompt in zip(indices, prompts, strict=True)
    ]  # fmt: skip
    result = []
    for problem, prompt, group in zip(problems, prompts, engine.run(requests), strict=True):
        rewards = [task.reward(problem, tokenizer.decode(sample.content)) for sample in group]
        mean = sum(rewards) / len(rewards)
        result += [Rollout(prompt, s, r, r - mean) for s, r in zip(group, rewards, strict=True)]
    return result


def informative(sampled: list[Rollout], count: int, size: int) -> list[Rollout]:
    """The `count` groups of `size` answers to train on: those with unequal rewards come first (DAPO's dynamic sampling,
    arXiv:2503.14476). Of the others every advantage is 0."""
    groups = [sampled[i : i + size] for i in range(0, len(sampled), size)]
    groups.sort(key=lambda group: not any(r.advantage for r in group))  # stable: otherwise as they were drawn
    return [rollout for group in groups[:count] for rollout in group]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) & 0x7FFFFFFF


def as_batch(group: list[Rollout], length: int, pad: int) -> dict[str, np.ndarray]:
    """Rows [len(group), length] of inputs, targets (-1: prompt, forced tokens and padding) and advantages."""
    rows = len(group)
    ids = np.full((rows, length + 1), pad, np.int32)
    counted = np.zeros((rows, length + 1), bool)
    for row, rollout in enumerate(group):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.sample.ids)
        ids[row, :end] = [*rollout.prompt, *rollout.sample.ids]
        counted[row, start:end] = np.asarray(rollout.sample.mask, bool)
    weights = np.array([r.advantage for r in group], np.float32)[:, None] * np.ones((1, length), np.float32)
    return {"inputs": ids[:, :-1], "targets": np.where(counted, ids, -1)[:, 1:], "weights": weights}


# -----------------------------------------------------------------------------
# The loop


def train(cfg: config.Rl) -> None:
    """Runs the RL stage to its end, or goes on with it."""
    check(cfg)
    with open_run(cfg, momentum=0.95) as run, Interruption() as interruption, ExitStack() as held:
        if run is None:
            return
        if jax.process_count() > 1:
            raise UserError("--stage=rl runs in one process, on all devices of one host: leave out --coordinator")
        if cfg.max_new_tokens > run.model_cfg.sequence_len - SHORTEST_PROMPT:
            raise UserError(
                f"--max_new_tokens={cfg.max_new_tokens}: the context has {run.model_cfg.sequence_len} tokens, "
                f"prompts included: try {run.model_cfg.sequence_len // 2}"
            )
        shape = batch_shape_of_answers(
            cfg, jax.device_count(), sharding.replicas(run.layout.mesh), run.model_cfg.sequence_len
        )
        for name in cfg.mixture:
            if tasks.task_class(name).eval_type != "generative":
                raise UserError(f"--mixture: {name} has no answers that can be generated and judged: try gsm8k=0")
        task = tasks.mixture(cfg.mixture, "train", cfg.task_data_dir)
        held_out = tasks.mixture(dict.fromkeys(cfg.mixture, 0), "val", cfg.task_data_dir)
        drawn = cfg.examples_per_step * cfg.oversampling  # problems a step
        steps = cfg.num_iterations if cfg.num_iterations > 0 else len(task) * cfg.num_epochs // drawn
        if drawn > len(task):  # a problem drawn twice would be answered twice in the same words
            raise UserError(
                f"--examples_per_step={cfg.examples_per_step} x --oversampling={cfg.oversampling} problems a step: "
                f"there are only {len(task)}"
            )
        pin_tasks(run, task)
        step_fn = step_of(run)
        run.begin()
        announce(run, shape, len(task), drawn, steps)
        # Divides by the devices, since the answers do.
        slots = min(drawn * cfg.num_samples, SLOTS * jax.device_count())
        less = "lower --num_samples, --examples_per_step or --max_new_tokens"
        held.enter_context(devices.out_of_memory_explained("the answers", less))
        engine = Engine(run.state.params, run.model_cfg, run.tokenizer, slots=slots, dtype=run.dtype)
        step, saved_at, timer = run.step, run.step if run.data is not None else -1, Timer()
        pace = []  # seconds a step, without the first of this process: it compiles
        while True:
            last = step >= steps
            judged = cfg.eval_every > 0 and (last or step % cfg.eval_every == 0)
            # Save before evaluating: whatever goes wrong below, the weights are safe.
            due = judged or (cfg.save_every > 0 and step % cfg.save_every == 0)
            if ((due and step > run.step) or last or interruption.signal) and saved_at != step:
                run.save(step, {"step": step})
                saved_at = step
                timer.lap()
            if interruption.signal:
                run.saver.wait_all()
                print(f"saved at step {step}: the same command goes on from here")
                raise SystemExit(128 + interruption.signal)
            engine.set_params(run.state.params)
            if judged:
                run.saver.wait_all()  # on the disk, not on its way
                evaluate(run, engine, held_out, step)
                engine.set_params(run.state.params)  # nothing of it is reused: a step is the same judged or not
                timer.lap()
            if last:
                break
            indices = problems_of(step, len(task), drawn, cfg.seed)
            sampled = rollouts(engine, run.tokenizer, task, indices, cfg, _seed(cfg.seed, step))
            chosen = informative(sampled, cfg.examples_per_step, cfg.num_samples)
            sampling = timer.lap()
            lr_mult = cfg.init_lr_frac * optim.linear_decay(step / steps)
            with out_of_memory_in_step(shape.rows):
                results = update(run, step_fn, chosen, shape, lr_mult)
            step += 1
            run.saver.raise_if_failed()
            training = timer.lap()
            if step > run.step + 1:
                pace.append(sampling + training)
                run.totals["seconds"] += pace[-1]
            eta = clock((steps - step) * float(np.mean(pace))) if pace else "n/a"
            log(run, step, steps, sampled, results, lr_mult, sampling, training, eta)
        engine.close()
        run.finish(step)
        print(f"rl: done, {step} steps in {clock(run.totals['seconds'])}")


def check(cfg: config.Rl) -> None:
    """UserError for numbers that no run can have."""
    least = {
        "examples_per_step": 1, "num_samples": 2, "oversampling": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0,
        "eval_examples": 1, "eval_samples": 1,
    }  # fmt: skip
    for name, limit in least.items():
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value >= limit):
            why = " (answers are compared with those to the same problem)" if name == "num_samples" else ""
            raise UserError(f"--{name}={value}: must be at least {limit}{why}")


def batch_shape_of_answers(cfg: config.Rl, count: int, replicas: int, seq_len: int) -> BatchShape:
    """The answers of a step as rows. UserError where they do not divide over `count` devices, of which
    `replicas` take rows of their own, or into micro-batches."""
    answers = cfg.examples_per_step * cfg.num_samples
    flags = f"--examples_per_step={cfg.examples_per_step} x --num_samples={cfg.num_samples}"
    if answers % count:
        raise UserError(f"{flags} answers do not divide over {count} devices")
    share, rows = answers // replicas, cfg.device_batch_size
    if rows < 1 or share % rows:
        raise UserError(
            f"--device_batch_size={rows} does not divide the {share} answers a device ({flags} / {replicas} devices): "
            f"try {math.gcd(share, max(1, rows))}"
        )
    return BatchShape(share // rows, rows, replicas, seq_len)


def problems_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """The problems of a step: `count` of a walk through a permutation of `size`, a new one for every epoch."""
    positions = range(step * count, (step + 1) * count)
    orders = {e: np.random.default_rng((seed, e)).permutation(size) for e in {p // size for p in positions}}
    return [int(orders[p // size][p % size]) for p in positions]


def update(run: Run, step_fn, group: list[Rollout], shape: BatchShape, lr_mult: float) -> dict:
    """One policy-gradient step on the answers of a step; the state of `run` becomes the new one."""
    longest = max(len(r.prompt) + len(r.sample.ids) for r in group)
    length = bucket(longest - 1, run.model_cfg.sequence_len, SHORTEST)  # few lengths: each is a compilation
    batch = as_batch(group, length, run.tokenizer.special("<|assistant_end|>"))
    arrays = shape.shaped(batch, run.layout.mesh, run.model_cfg.vocab_size)
    run.state, results = step_fn(run.state, arrays, jnp.float32(lr_mult))
    results = {k: float(v) for k, v in results.items()}
    if not np.isfinite([results["loss"], results["grad_norm"]]).all():
        raise UserError(f"the loss is {results['loss']}: lower the learning rates; the last checkpoint is in {run.dir}")
    run.totals["tokens"] += len(group) * length
    run.totals["flops"] += len(group) * length * run.model_cfg.flops_per_token
    return results


def announce(run: Run, shape: BatchShape, problems: int, drawn: int, steps: int) -> None:
    cfg = run.cfg
    print(f"  parameters: {run.model_cfg.num_params:,}, FLOPs a token: {run.model_cfg.flops_per_token:.3e}")
    names = ", ".join(cfg.mixture)
    print(
        f"  task: {names}, {problems:,} problems; {drawn} a step, {cfg.num_samples} answers each, "
        f"{cfg.examples_per_step} to train on"
    )
    mesh = sharding.describe(run.layout.mesh)
    print(f"  batch: {shape} (mesh {mesh})")
    print(f"  steps: {steps}")
    print("compiling ...", flush=True)


def log(
    run: Run, step: int, steps: int, sampled: list[Rollout], results: dict, lr_mult, sampling, training, eta: str
) -> None:
    """One step: of all sampled answers the reward, the length, how many groups taught nothing; where the time went."""
    size = run.cfg.num_samples
    groups = [sampled[i : i + size] for i in range(0, len(sampled), size)]
    length = float(np.mean([len(r.sample.ids) for r in sampled]))
    fields = {
        "loss": results["loss"], "grad_norm": results["grad_norm"], "lr_mult": lr_mult,
        "dt": sampling + training if step > run.step + 1 else None,  # the first step of a process compiles
        "reward": float(np.mean([r.reward for r in sampled])), "sequence_length": length,
        "zero_advantage": float(np.mean([all(r.advantage == 0 for r in g) for g in groups])),
        "truncated": float(np.mean([r.sample.finish_reason == "length" for r in sampled])),
        "sampling_seconds": sampling,
    }  # fmt: skip
    run.log("train", step, **fields)
    print(
        f"step {step}/{steps} ({100 * step / steps:.1f}%) | reward {fields['reward']:.3f} | "
        f"{fields['zero_advantage']:.0%} of problems without advantage | length {length:.0f} | "
        f"cut off {fields['truncated']:.1%} | lr x{lr_mult:.4f} | "
        f"sampling {sampling:.1f} s, training {training:.1f} s | eta {eta}",
        flush=True,
    )


def evaluate(run: Run, engine: Engine, task, step: int) -> None:
    """pass@k on held-out problems: the share of problems with a right answer among the first k."""
    cfg = run.cfg
    count = min(cfg.eval_examples, len(task))
    problems = [task[i] for i in range(count)]
    requests = [
        Request(
            ids=run.tokenizer.render_for_completion(p, max_tokens=run.model_cfg.sequence_len - cfg.max_new_tokens),
            max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, n=cfg.eval_samples,
            seed=_seed(cfg.seed, 1, i),
        )
        for i, p in enumerate(problems)
    ]  # fmt: skip
    answers = engine.run(requests)
    right = np.array([
        [task.evaluate(p, run.tokenizer.decode(s.content)) for s in group]
        for p, group in zip(problems, answers, strict=True)
    ])  # fmt: skip
    passed = {f"pass@{k}": float(right[:, :k].any(1).mean()) for k in range(1, cfg.eval_samples + 1)}
    run.log("val", step, n=count, **passed)
    shown = ", ".join(f"{k} {v:.3f}" for k, v in passed.items() if k in ("pass@1", "pass@4", "pass@8"))
    print(f"step {step} | {'|'.join(cfg.mixture)}: {shown}", flush=True)
