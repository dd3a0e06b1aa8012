"""Evaluates a model on chat tasks: multiple choice (ARC, MMLU) and generated answers (GSM8K, HumanEval, SpellingBee).

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i sft -a "GSM8K|HumanEval" -x 100

Adds the scores to the log of the evaluated run, and writes the answers to $NANOCHAT_BASE_DIR/chat_eval.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config, files

if TYPE_CHECKING:
    from nanochat_jax.evals.chat import ChatScore


def main(cfg: config.ChatEval) -> None:
    if not cfg.source:
        raise config.UserError(f"-i is missing: name the stage to evaluate, one of {', '.join(config.STAGES)}")
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    from nanochat_jax import tasks, trained_model
    from nanochat_jax.evals import chat
    from nanochat_jax.evals.model import on_all_devices
    from nanochat_jax.evals.score import Metric, log_score

    # Check and load all tasks first, so that errors appear before a long evaluation.
    names = [name.strip() for name in cfg.task_name.split("|") if name.strip()] or list(chat.CHATCORE_TASKS)
    for name in names:
        if tasks.task_class(name).eval_type is None:
            scored = ", ".join(cls.name for cls in tasks.TASKS.values() if cls.eval_type)
            raise config.UserError(f"-a {name}: for training only; tasks with a score are {scored}")
    # A missing checkpoint should fail before any download.
    run, step = trained_model.find(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
    loaded = [tasks.load(name, cfg.split, data_dir=cfg.task_data_dir, task_files=cfg.task_files) for name in names]
    model = trained_model.load(cfg.source, run.name, step)
    eval_model = on_all_devices(model, cfg.compute_dtype)
    sampling = chat.Sampling(cfg.temperature, cfg.top_k, cfg.max_new_tokens, cfg.num_samples, cfg.seed)
    settings = {"num_samples": cfg.num_samples, "temperature": cfg.temperature}
    folder = config.base_dir() / "chat_eval" / f"{model.stage}_{model.tag}_{model.step:06d}"
    scores = []
    for task in loaded:
        score = chat.evaluate(
            eval_model, task, sampling, batch_size=cfg.batch_size, max_problems=cfg.max_problems, slots=cfg.slots
        )
        scores.append(score)
        print(f"{score.task}: {score.score:.4f} ± {score.stderr:.4f} (n={score.n:,})", flush=True)
        name = score.task if task.split == "test" else f"{score.task}-{task.split}"
        write_answers(folder / f"{name}.jsonl", score.answers)
        details = {"split": task.split, "truncated": score.truncated, "max_new_tokens": cfg.max_new_tokens}
        log_score(model, "chat", score, **settings, **details)

    # Log ChatCORE if all of its tasks were evaluated on their test splits.
    tested = [score for task, score in zip(loaded, scores, strict=True) if task.split == "test"]
    mean = chat.chat_core(tested)
    if mean:
        n = sum(s.n for s in tested if s.task in chat.CHATCORE_TASKS)
        seconds = sum(s.seconds for s in tested)
        total = Metric("ChatCORE", mean[0], n, baseline=0.0, seconds=seconds, stderr=mean[1])
        log_score(model, "chat", total, split="test", **settings)
    print_table(f"{model.name}, step {model.step}", scores, mean)
    print(f"answers in {folder}")


def write_answers(path: Path, answers: list[dict]) -> None:
    """Writes one line of JSON per problem, so that the user can see what went wrong."""
    files.write_text(path, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))


def print_table(title: str, scores: list["ChatScore"], chat_core: tuple[float, float] | None) -> None:
    """Prints one row per task. If `chat_core` is given, a last row shows ChatCORE and its standard error."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("task")
    for name in ("score", "centered", "n", "truncated", "seconds"):
        table.add_column(name, justify="right")
    for s in scores:
        truncated = "" if s.truncated is None else f"{s.truncated:.0%}"
        table.add_row(
            s.task, f"{s.score:.4f} ± {s.stderr:.4f}", f"{s.centered:+.4f}", f"{s.n:,}", truncated, f"{s.seconds:.1f}"
        )
    if chat_core:
        table.add_row("ChatCORE", "", f"{chat_core[0]:+.4f} ± {chat_core[1]:.4f}", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    commandline.run(main, config.ChatEval)
