"""Evaluates a model on CORE, a set of 22 in-context learning tasks.

    python -m scripts.base_eval
    python -m scripts.base_eval --max_per_task=500

CORE is meant for base models, which are only pretrained. The script adds the scores to the log of the model's run, and
writes them to $NANOCHAT_BASE_DIR/base_eval/<model>.csv.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config, files

if TYPE_CHECKING:
    from nanochat_jax.evals.core import CoreResult, CoreScore


def main(cfg: config.BaseEval) -> None:
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    import time

    from nanochat_jax import trained_model
    from nanochat_jax.evals import core
    from nanochat_jax.evals.model import on_all_devices
    from nanochat_jax.evals.score import Metric, log_score

    model = trained_model.load(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
    eval_model = on_all_devices(model, cfg.compute_dtype)
    bundle = core.find_bundle(cfg.core_dir)
    start = time.monotonic()

    def report(score: "CoreScore") -> None:
        print_score(score)
        log_score(model, "core", score, centered=score.centered, max_per_task=cfg.max_per_task)

    result = core.evaluate(
        eval_model, bundle, batch_size=cfg.device_batch_size, max_per_task=cfg.max_per_task, report=report
    )
    mean = Metric("CORE", result.core, result.n, baseline=0.0, seconds=time.monotonic() - start, stderr=result.stderr)
    log_score(model, "core", mean, centered=result.core, max_per_task=cfg.max_per_task)
    print(f"CORE {result.core:.4f} ± {result.stderr:.4f} ({len(result.tasks)} tasks, {result.n:,} items)")
    path = config.base_dir() / "base_eval" / f"{model.stage}_{model.tag}_{model.step:06d}.csv"
    write_csv(path, result)
    print(f"written to {path}")


def print_score(score: "CoreScore") -> None:
    truncated = f", {score.truncated:,} prompts truncated to the context" if score.truncated else ""
    print(
        f"{score.task:<34}{score.score:.4f} ± {score.stderr:.4f}  centered {score.centered:+.4f}"
        f"  n={score.n:,}  {score.seconds:.1f} s{truncated}",
        flush=True,
    )


def write_csv(path: Path, result: "CoreResult") -> None:
    """Writes a CSV file with the accuracy and the centered accuracy of each task. Padded columns make the file easy to
    read."""
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(score.task, f"{score.score:.6f}", f"{score.centered:.6f}") for score in result.tasks]
    rows += [("CORE", "", f"{result.core:.6f}")]
    files.write_text(path, "".join(f"{a:<35}, {b:<10}, {c:<10}\n" for a, b, c in rows))


if __name__ == "__main__":
    commandline.run(main, config.BaseEval)
