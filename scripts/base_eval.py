"""Evaluates a model on CORE, a set of 22 in-context learning tasks.

    python -m scripts.base_eval
    python -m scripts.base_eval --max_per_task=500

CORE is meant for base models, which are only pretrained. The script adds the scores to the log of the model's run, and
writes them to $NANOCHAT_BASE_DIR/base_eval/<model>.csv. With --max_per_task=500, the file is <model>_max500.csv, so
that it does not replace the scores on all examples.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config, files

if TYPE_CHECKING:
    from nanochat_jax.evals.core import CoreResult, CoreScore


def main(cfg: config.BaseEval) -> None:
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    from nanochat_jax import trained_model
    from nanochat_jax.evals import core
    from nanochat_jax.evals.model import on_all_devices
    from nanochat_jax.evals.score import Metric, log_score

    model = trained_model.load(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
    eval_model = on_all_devices(model, cfg.compute_dtype)
    bundle = core.find_bundle(cfg.core_dir)

    def report(score: "CoreScore") -> None:
        print_score(score)
        log_score(
            model, "core", score, centered=score.centered, cut=score.cut, prompts=score.prompts, shots=score.shots,
            max_per_task=cfg.max_per_task,
        )  # fmt: skip

    result = core.evaluate(
        eval_model, bundle, batch_size=cfg.device_batch_size, max_per_task=cfg.max_per_task, report=report
    )
    mean = Metric("CORE", result.core, result.n, baseline=0.0, seconds=result.seconds, stderr=result.stderr)
    log_score(model, "core", mean, centered=result.core, cut=result.cut, max_per_task=cfg.max_per_task)
    print(result)
    part = f"_max{cfg.max_per_task}" if cfg.max_per_task > 0 else ""
    path = config.base_dir() / "base_eval" / f"{model.stage}_{model.tag}_{model.step:06d}{part}.csv"
    write_csv(path, result)
    print(f"written to {path}")


def print_score(score: "CoreScore") -> None:
    """Prints a task's score, and whether prompts were cut or had fewer few-shot examples than the task asks for."""
    from nanochat_jax.evals.score import list_notes, with_error

    notes = list_notes(score.cut, score.prompts)
    if score.shots < score.num_fewshot:
        notes.append(f"only {score.shots} of {score.num_fewshot} few-shot examples")
    centered = f"centered {with_error(score.centered, score.centered_stderr, sign='+')}"
    print(f"{score.task:<34}" + ", ".join([str(score), centered, *notes, f"{score.seconds:.1f} s"]), flush=True)


def write_csv(path: Path, result: "CoreResult") -> None:
    """Writes a CSV file with one row for each task and one for CORE. Padded columns make the file easy to read.

    The column Stderr contains the standard error of the accuracy. In the row of CORE, it contains the standard error of
    CORE. The column Cut contains the number of prompts that were cut to fit in the context.
    """
    rows = [("Task", "Accuracy", "Centered", "Stderr", "N", "Cut")]
    rows += [
        (s.task, f"{s.score:.6f}", f"{s.centered:.6f}", f"{s.stderr:.6f}", str(s.n), str(s.cut)) for s in result.tasks
    ]
    rows += [("CORE", "", f"{result.core:.6f}", f"{result.stderr:.6f}", str(result.n), str(result.cut))]
    lines = [", ".join([f"{task:<35}", *(f"{cell:<10}" for cell in cells)]) for task, *cells in rows]
    files.write_text(path, "".join(line + "\n" for line in lines))


if __name__ == "__main__":
    commandline.run(main, config.BaseEval)
