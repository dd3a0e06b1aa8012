"""What is judged while training, from time to time: validation loss, CORE, samples, tasks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import config, tasks
from nanochat_jax.config import GPTConfig, Train, UserError
from nanochat_jax.parallel import processes
from nanochat_jax.training.run import Run
from nanochat_jax.training.stages import Stage

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class Evaluation:
    """Something to do every `every` steps and at the end; below 1: never, or at the end alone where `at_end`.

    A checkpoint comes before every `risky` one, which loads data or generates; before another only the first time in a
    process. After that it has shown that it works, and a checkpoint each time would cost more than it saves.
    """

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
        judge = functools.partial(task_metrics, judged=tasks_to_evaluate(cfg))
        return [*all_stages, Evaluation(judge, cfg.eval_metrics_every)]
    return all_stages


def tasks_to_evaluate(cfg: config.Sft) -> list[tasks.Task]:
    """The tasks of --eval_metrics_tasks, loaded before the first step: what is wrong with them is said then."""
    loaded = [tasks.load(name, "val", data_dir=cfg.task_data_dir) for name in cfg.eval_metrics_tasks.split("|")]
    for task in loaded:
        if task.eval_type is None:
            raise UserError(f"--eval_metrics_tasks: {task.name} is only for training, its answers cannot be judged")
    return loaded


def validate(run: Run, stage: Stage, step: int) -> None:
    from nanochat_jax.evals.bpb import bits_per_byte

    batches = stage.validation()
    bpb = bits_per_byte(run.eval_model, batches)
    batches.close()
    run.log("val", step, bpb=bpb)
    print(f"step {step} | validation bits per byte {bpb:.6f}", flush=True)


def core_metric(run: Run, stage: Stage, step: int) -> None:
    from nanochat_jax.evals import core

    try:
        bundle = Path(processes.broadcast_from_0(lambda: str(core.find_bundle(run.cfg.core_dir))))
    except UserError as error:
        print(f"step {step} | CORE skipped: {error}")
        return
    result = core.evaluate(run.eval_model, bundle, max_per_task=run.cfg.core_metric_max_per_task)
    run.log("core", step, core=result.core, stderr=result.stderr, n=result.n)
    print(f"step {step} | CORE {result.core:.4f}", flush=True)


def sample(run: Run, stage: Stage, step: int) -> None:
    """What the model makes of seven prompts, greedily."""
    for prompt, text in complete(run.state.params, run.model_cfg, run.tokenizer, run.dtype):
        run.log("sample", step, task=prompt, text=text)
        print(f"  {prompt}{text!r}")


def complete(params, model_cfg: GPTConfig, tokenizer, dtype, new_tokens: int = 16) -> list[tuple[str, str]]:
    """Greedy continuations of SAMPLE_PROMPTS, as (prompt, continuation)."""
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request

    engine = Engine(params, model_cfg, tokenizer, slots=len(SAMPLE_PROMPTS), dtype=dtype)
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
        score = chat.evaluate(run.eval_model, task, max_problems=run.cfg.eval_metrics_max_problems)
        run.log(
            "eval", step, task=score.task, suite="chat", split=task.split, score=score.score, stderr=score.stderr,
            n=score.n,
        )  # fmt: skip
        print(f"step {step} | {score.task} {score.score:.4f} ± {score.stderr:.4f} (n={score.n})", flush=True)
