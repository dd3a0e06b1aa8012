"""Evaluations during training: validation loss, CORE, samples, tasks.

`evaluations_of` sets how often each evaluation runs, and `RunControl` runs it when it is due. The results are written
to the run's log.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from jax.typing import DTypeLike

from nanochat_jax import config, tasks
from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.evals.bundle import find_bundle
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, processes
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training.run import Run
from nanochat_jax.training.run_control import Evaluation
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
FEWER_EVALUATIONS = "turn off evaluations, with -1 for --core_metric_every, --sample_every or --eval_metrics_every"


def evaluations_of(run: Run, stage: Stage, cfg: config.Base | config.Mid | config.Sft) -> list[Evaluation]:
    """Returns the evaluations of a stage.

    Every stage evaluates the validation loss. Pretraining adds CORE and samples, and finetuning adds tasks.
    """

    def evaluation(evaluate: Callable, every: int, **when: bool) -> Evaluation:
        return Evaluation(functools.partial(_evaluate, evaluate, run), every, **when)

    held_out = functools.partial(validate, stage=stage)
    evaluations = [evaluation(held_out, cfg.eval_every, risky=False, at_start=True, at_end=True)]
    if isinstance(cfg, config.Base):
        if cfg.core_dir and cfg.core_metric_every > 0:
            # Find the CORE bundle now, so that a wrong folder raises an error before the first step.
            processes.broadcast_from_0(lambda: str(find_bundle(cfg.core_dir)))
        evaluations.append(evaluation(functools.partial(core_metric, cfg=cfg), cfg.core_metric_every))
        evaluations.append(evaluation(sample, cfg.sample_every))
    if isinstance(cfg, config.Sft) and cfg.eval_metrics_every > 0:
        loaded = tasks_to_evaluate(cfg)
        metrics = functools.partial(task_metrics, loaded=loaded, max_problems=cfg.eval_metrics_max_problems)
        evaluations.append(evaluation(metrics, cfg.eval_metrics_every))
    return evaluations


def _evaluate(evaluate: Callable[[Run, int], None], run: Run, step: int) -> None:
    with devices.out_of_memory_explained("an evaluation", FEWER_EVALUATIONS):
        evaluate(run, step)


def tasks_to_evaluate(cfg: config.Sft) -> list[tasks.Task]:
    """Loads the tasks of --eval_metrics_tasks. This happens before the first step, so that errors appear early."""
    try:
        loaded = [
            tasks.load(name, "val", data_dir=cfg.task_data_dir, task_files=cfg.task_files)
            for name in cfg.eval_metrics_tasks.split("|")
        ]
    except UserError as error:
        skip = "or train without these evaluations (--eval_metrics_every=-1)"
        raise UserError(f"--eval_metrics_tasks={cfg.eval_metrics_tasks}: {error}, {skip}") from None
    for task in loaded:
        if task.eval_type is None:
            raise UserError(f"--eval_metrics_tasks: {task.name} is for training only, its answers cannot be evaluated")
    return loaded


def validate(run: Run, step: int, stage: Stage) -> None:
    """Logs the model's bits per byte on held-out data."""
    from nanochat_jax.evals.bpb import bits_per_byte

    batches = stage.validation()
    result = bits_per_byte(run.eval_model, batches)
    batches.close()
    run.log("val", step, bpb=result.bpb, stderr=result.stderr, n=result.tokens, rows=result.rows)
    print(f"step {step} | validation bits per byte {result}", flush=True)


def core_metric(run: Run, step: int, cfg: config.Base) -> None:
    """Logs CORE, computed on at most --core_metric_max_per_task examples per task.

    If there is no CORE bundle, only prints a message.
    """
    from nanochat_jax.evals import core

    try:
        bundle = Path(processes.broadcast_from_0(lambda: str(find_bundle(cfg.core_dir))))
    except UserError as error:
        print(f"step {step} | CORE skipped: {error}")
        return
    result = core.evaluate(run.eval_model, bundle, max_per_task=cfg.core_metric_max_per_task)
    centered = {score.task: score.centered for score in result.tasks}
    run.log("core", step, core=result.core, stderr=result.stderr, n=result.n, cut=result.cut, centered=centered)
    print(f"step {step} | {result}", flush=True)


def sample(run: Run, step: int) -> None:
    """Logs a greedy continuation of each of SAMPLE_PROMPTS."""
    for prompt, text in complete(run.state.params, run.model_cfg, run.tokenizer, run.dtype):
        run.log("sample", step, task=prompt, text=text)
        print(f"  {prompt + text!r}")


def complete(
    params: gpt.Params, model_cfg: GPTConfig, tokenizer: Tokenizer, dtype: DTypeLike, new_tokens: int = 16
) -> list[tuple[str, str]]:
    """Returns (prompt, greedy continuation) for each of SAMPLE_PROMPTS."""
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


def task_metrics(run: Run, step: int, loaded: list[tasks.Task], max_problems: int) -> None:
    """Logs each task's score on at most `max_problems` problems."""
    from nanochat_jax.evals import chat

    for task in loaded:
        score = chat.evaluate(run.eval_model, task, max_problems=max_problems)
        run.log(
            "eval", step, task=score.task, suite="chat", split=task.split, score=score.score, stderr=score.stderr,
            n=score.n, truncated=score.truncated, cut=score.cut,
        )  # fmt: skip
        print(f"step {step} | " + ", ".join([f"{score.task} ({task.split}) {score}", *score.notes]), flush=True)
