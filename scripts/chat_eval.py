"""Evaluates a model on chat tasks: multiple choice (ARC, MMLU) and generated answers (GSM8K, HumanEval, SpellingBee).

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i sft -a "GSM8K|HumanEval" -x 100

Adds the scores to the log of the evaluated run, and writes the answers to $NANOCHAT_BASE_DIR/chat_eval. With other
settings, such as -x 100, the answers go to a separate file, so that they do not replace the answers to all problems.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config, files

if TYPE_CHECKING:
    from nanochat_jax.evals.chat import ChatScore
    from nanochat_jax.evals.score import Metric
    from nanochat_jax.tasks import Task


def main(cfg: config.ChatEval) -> None:
    if not cfg.source:
        raise config.UserError(f"-i is missing: name the stage to evaluate, one of {', '.join(config.STAGES)}")
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    from nanochat_jax import checkpoint, tasks, trained_model
    from nanochat_jax.evals import chat
    from nanochat_jax.evals.model import on_all_devices
    from nanochat_jax.evals.score import Metric, log_score

    # Check and load all tasks first, so that errors appear before a long evaluation.
    names = [name.strip() for name in cfg.task_name.split("|") if name.strip()] or list(chat.CHATCORE_TASKS)
    for name in names:
        if tasks.task_class(name).eval_type is None:
            scored = ", ".join(cls.name for cls in tasks.TASKS.values() if cls.eval_type)
            raise config.UserError(f"-a {name}: for training only; tasks with a score are {scored}")
    # Find the checkpoint before any download, so that a missing checkpoint is reported at once.
    run, step = trained_model.find(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
    task_files = cfg.task_files or task_files_of_training(checkpoint.read_meta(run, step))
    loaded = [tasks.load(name, cfg.split, data_dir=cfg.task_data_dir, task_files=task_files) for name in names]
    model = trained_model.load(cfg.source, run.name, step)
    eval_model = on_all_devices(model, cfg.compute_dtype)
    sampling = chat.Sampling(cfg.temperature, cfg.top_k, cfg.max_new_tokens, cfg.num_samples, cfg.seed)
    print(describe_sampling(cfg))
    if other := [task.name for task in loaded if task.split != cfg.split]:
        print(f"no {cfg.split} split, evaluated on test: {', '.join(other)}")
    folder = config.base_dir() / "chat_eval" / f"{model.stage}_{model.tag}_{model.step:06d}"
    scores = []
    for task in loaded:
        score = chat.evaluate(
            eval_model, task, sampling, batch_size=cfg.batch_size, max_problems=cfg.max_problems, slots=cfg.slots
        )
        scores.append(score)
        part = [f"the first of {len(task):,} problems"] if score.n < len(task) else []
        print(", ".join([f"{score.task}: {score}", *part, *score.notes]), flush=True)
        write_answers(folder / f"{answers_name(cfg, task, score.n)}.jsonl", score.answers)
        details = {"split": task.split, "truncated": score.truncated, "cut": score.cut}
        log_score(model, "chat", score, **details, **settings_used(cfg, task.eval_type))

    # Log ChatCORE if all of its tasks were evaluated on their test splits.
    tested = [score for task, score in zip(loaded, scores, strict=True) if task.split == "test"]
    mean = chat.chat_core(tested)
    total = None
    if mean:
        parts = [score for score in tested if score.task in chat.CHATCORE_TASKS]
        n, seconds = sum(score.n for score in parts), sum(score.seconds for score in parts)
        total = Metric("ChatCORE", mean[0], n, baseline=0.0, seconds=seconds, stderr=mean[1])
        cut = sum(score.cut for score in parts)
        log_score(model, "chat", total, split="test", cut=cut, **settings_used(cfg, "generative"))
    print_table(f"{model.name}, step {model.step}", scores, total)
    if not mean:
        missing = [name for name in chat.CHATCORE_TASKS if name not in [score.task for score in tested]]
        print(f"no ChatCORE: not evaluated on the test problems of {', '.join(missing)}")
    print(f"answers in {folder}")


def task_files_of_training(meta: dict) -> str:
    """Returns the --task_files that the model was trained with, and prints it. A base model had none: "generated"."""
    trained = meta.get("config", {}).get("task_files")
    print(f"--task_files={trained or 'generated'}, {'as in training' if trained else 'since training did not set it'}")
    return trained or "generated"


def describe_sampling(cfg: config.ChatEval) -> str:
    """Says how answers are generated. Multiple-choice problems are scored without generating an answer."""
    if cfg.temperature:
        how = f"temperature {cfg.temperature:g}, top-k {cfg.top_k or 'off'}, seed {cfg.seed}"
    else:
        how = "greedy"
    many = ""
    if cfg.num_samples > 1:
        many = f", {cfg.num_samples} per problem, solved if any is right (pass@{cfg.num_samples})"
        many += "" if cfg.temperature else "; they are all equal, because -t is 0"
    return f"answers: {how}, at most {cfg.max_new_tokens} tokens{many}"


def settings_used(cfg: config.ChatEval, eval_type: str | None) -> dict[str, float]:
    """Returns the settings that affect the answers to a task. They are logged with the task's score.

    In multiple-choice tasks, the choice is always greedy. Greedy answers do not depend on --top_k and --seed.
    """
    settings: dict[str, float] = {"num_samples": 1, "temperature": 0.0}
    if eval_type == "generative":
        settings |= {"num_samples": cfg.num_samples, "temperature": cfg.temperature}
        settings |= {"max_new_tokens": cfg.max_new_tokens}
        settings |= {"top_k": cfg.top_k, "seed": cfg.seed} if cfg.temperature else {}
    return settings


def answers_name(cfg: config.ChatEval, task: "Task", n: int) -> str:
    """Returns the name of a task's file of answers, without .jsonl.

    With the default settings, the name is just the task's name. Each setting that has another value and affects the
    answers is added to the name. Examples: "GSM8K", "GSM8K-val-first20-temperature0.8".
    """
    usual = settings_used(config.ChatEval(temperature=cfg.temperature), task.eval_type) | {"temperature": 0.0}
    changed = {k: v for k, v in settings_used(cfg, task.eval_type).items() if v != usual[k]}
    parts = [task.name] + ([task.split] if task.split != "test" else []) + ([f"first{n}"] if n < len(task) else [])
    return "-".join(parts + [f"{name}{value:g}" for name, value in changed.items()])


def write_answers(path: Path, answers: list[dict]) -> None:
    """Writes one line of JSON per problem, so that the user can see what went wrong."""
    files.write_text(path, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))


def print_table(title: str, scores: list["ChatScore"], chat_core: "Metric | None") -> None:
    """Prints one row per task. If `chat_core` is given, a last row shows ChatCORE."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from nanochat_jax.evals.score import with_error

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("task")
    for name in ("score", "centered", "n", "truncated", "cut", "seconds"):
        table.add_column(name, justify="right")
    for s in scores:
        truncated = "" if s.truncated is None else f"{s.truncated:.0%}"
        table.add_row(
            s.task, with_error(s.score, s.stderr), f"{s.centered:+.4f}", f"{s.n:,}", truncated, f"{s.cut:,}",
            f"{s.seconds:.1f}",
        )  # fmt: skip
    if chat_core:
        centered = with_error(chat_core.score, chat_core.stderr, sign="+")
        table.add_row("ChatCORE", "", centered, f"{chat_core.n:,}", "", "", f"{chat_core.seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    commandline.run(main, config.ChatEval)
