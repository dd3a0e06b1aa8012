"""Chat tasks: multiple choice (ARC, MMLU) and generated answers (GSM8K, HumanEval, SpellingBee).

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i sft -a "GSM8K|HumanEval" -x 100

Adds to the log of the run that is judged; the answers are written to $NANOCHAT_BASE_DIR/chat_eval.
"""

import json
from pathlib import Path

from nanochat_jax import commandline, config, files


def main(cfg: config.ChatEval) -> None:
    if not cfg.source:
        raise config.UserError(f"-i is missing: which stage to judge, {', '.join(config.STAGES)}")
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    import jax

    from nanochat_jax import checkpoint, run_log, tasks
    from nanochat_jax.evals import chat
    from nanochat_jax.parallel import sharding

    # Every task is there and can be judged before the first one takes its time.
    names = [name.strip() for name in cfg.task_name.split("|") if name.strip()] or list(chat.CHATCORE_TASKS)
    for name in names:
        if tasks.task_class(name).eval_type is None:
            judged = ", ".join(cls.name for cls in tasks.TASKS.values() if cls.eval_type)
            raise config.UserError(f"-a {name}: a task only for training; those with a score are {judged}")
    checkpoint.find(cfg.source, cfg.model_tag, cfg.step)  # before anything is downloaded for it
    loaded = [tasks.load(name, cfg.split, data_dir=cfg.task_data_dir or None) for name in names]
    model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
    dtype = devices.choose_precision(cfg.compute_dtype, model_cfg=model.model_cfg)
    params = jax.device_put(model.params, sharding.replicated(sharding.make_mesh()))
    folder = config.base_dir() / "chat_eval" / f"{model.stage}_{model.tag}_{model.step:06d}"
    scores = []
    for task in loaded:
        score = chat.evaluate(
            params, model.model_cfg, model.tokenizer, task, dtype=dtype, batch_size=cfg.batch_size,
            max_problems=cfg.max_problems, num_samples=cfg.num_samples, temperature=cfg.temperature, top_k=cfg.top_k,
            max_new_tokens=cfg.max_new_tokens, slots=cfg.slots, seed=cfg.seed,
        )  # fmt: skip
        scores.append(score)
        print(f"{score.task}: {score.score:.4f} ± {score.stderr:.4f} (n={score.n:,})", flush=True)
        name = score.task if task.split == "test" else f"{score.task}-{task.split}"
        write_answers(folder / f"{name}.jsonl", score.answers)
        run_log.append(
            model.run_dir, "eval", model.stage, model.step, task=score.task, suite="chat", split=task.split,
            score=score.score, stderr=score.stderr, n=score.n, baseline=score.baseline, truncated=score.truncated,
            seconds=round(score.seconds, 3), num_samples=cfg.num_samples, temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
        )  # fmt: skip
    tested = [score for task, score in zip(loaded, scores, strict=True) if task.split == "test"]
    total = chat.chat_core(tested)
    if total:
        run_log.append(
            model.run_dir, "eval", model.stage, model.step, task="ChatCORE", suite="chat", split="test",
            score=total[0], stderr=total[1], n=sum(s.n for s in tested if s.task in chat.CHATCORE_TASKS),
            baseline=0.0, seconds=round(sum(s.seconds for s in tested), 3), num_samples=cfg.num_samples,
            temperature=cfg.temperature,
        )  # fmt: skip
    print_table(f"{model.name}, step {model.step}", scores, total)
    print(f"answers in {folder}")


def write_answers(path: Path, answers: list[dict]) -> None:
    """One problem a line, to see what went wrong."""
    files.write_text(path, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))


def print_table(title: str, scores: list, total: tuple[float, float] | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("task")
    for name in ("score", "centered", "n", "cut off", "seconds"):
        table.add_column(name, justify="right")
    for s in scores:
        cut = "" if s.truncated is None else f"{s.truncated:.0%}"
        table.add_row(
            s.task, f"{s.score:.4f} ± {s.stderr:.4f}", f"{s.centered:+.4f}", f"{s.n:,}", cut, f"{s.seconds:.1f}"
        )
    if total:
        table.add_row("ChatCORE", "", f"{total[0]:+.4f} ± {total[1]:.4f}", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    commandline.run(main, config.ChatEval)
