"""CORE: 22 in-context learning tasks, mostly for models that are only pretrained.

    python -m scripts.base_eval
    python -m scripts.base_eval --max_per_task=500

Adds to the log of the run that is judged and writes $NANOCHAT_BASE_DIR/base_eval/<model>.csv.
"""

from pathlib import Path

from nanochat_jax import commandline, config, files


def main(cfg: config.BaseEval) -> None:
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    import time

    import jax

    from nanochat_jax import checkpoint, run_log
    from nanochat_jax.evals import core
    from nanochat_jax.parallel import sharding

    model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
    dtype = devices.choose_precision(cfg.compute_dtype, model_cfg=model.model_cfg)
    bundle = core.find_bundle(cfg.core_dir)
    params = jax.device_put(model.params, sharding.replicated(sharding.make_mesh()))
    start = time.monotonic()

    def tell(one: core.CoreScore) -> None:
        cut = f", {one.truncated:,} prompts cut to the context" if one.truncated else ""
        print(
            f"{one.task:<34}{one.score:.4f} ± {one.stderr:.4f}  centered {one.centered:+.4f}"
            f"  n={one.n:,}  {one.seconds:.1f} s{cut}",
            flush=True,
        )
        log(one.task, one.score, one.stderr, one.n, one.baseline, one.centered, one.seconds)

    def log(task: str, score, stderr, n, baseline, centered, seconds) -> None:
        run_log.append(
            model.run_dir, "eval", model.stage, model.step, task=task, suite="core", score=score, stderr=stderr, n=n,
            baseline=baseline, centered=centered, seconds=round(seconds, 3), max_per_task=cfg.max_per_task,
        )  # fmt: skip

    result = core.evaluate(
        params, model.model_cfg, model.tokenizer, bundle, dtype=dtype, batch_size=cfg.device_batch_size,
        max_per_task=cfg.max_per_task, report=tell,
    )  # fmt: skip
    log("CORE", result.core, result.stderr, result.n, 0.0, result.core, time.monotonic() - start)
    print(f"CORE {result.core:.4f} ± {result.stderr:.4f} ({len(result.tasks)} tasks, {result.n:,} items)")
    path = config.base_dir() / "base_eval" / f"{model.stage}_{model.tag}_{model.step:06d}.csv"
    write_csv(path, result)
    print(f"written to {path}")


def write_csv(path: Path, result) -> None:
    """Task, accuracy and centered accuracy in columns that also the eye can follow."""
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(one.task, f"{one.score:.6f}", f"{one.centered:.6f}") for one in result.tasks]
    rows += [("CORE", "", f"{result.core:.6f}")]
    files.write_text(path, "".join(f"{a:<35}, {b:<10}, {c:<10}\n" for a, b, c in rows))


if __name__ == "__main__":
    commandline.run(main, config.BaseEval)
