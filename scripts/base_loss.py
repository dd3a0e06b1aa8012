"""Computes a model's bits per byte on training and validation text, and prints seven samples from the model.

    python -m scripts.base_loss
    python -m scripts.base_loss -g d20 --split_tokens=1e6

Adds the bits per byte and the samples to the log of the evaluated run. Uses the text that the run was trained on,
unless --data or --data_dir names another text. Packs the text into rows in the same way as in training.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config

if TYPE_CHECKING:
    import numpy as np

    from nanochat_jax.data.sources import Source
    from nanochat_jax.progress import Progress


def main(cfg: config.BaseLoss) -> None:
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    import time

    from nanochat_jax import run_log, trained_model
    from nanochat_jax.data import dataloader
    from nanochat_jax.evals.batching import num_rows
    from nanochat_jax.evals.bpb import bits_per_byte
    from nanochat_jax.evals.model import on_all_devices
    from nanochat_jax.evals.score import Metric, log_score
    from nanochat_jax.progress import Progress
    from nanochat_jax.training.validation import complete

    model = trained_model.load(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
    eval_model = on_all_devices(model, cfg.compute_dtype)
    source = choose_source(model.meta, cfg)
    packing = model.meta["config"].get("packing", "split")
    rows, seq_len = num_rows(eval_model.params, model.model_cfg, cfg.device_batch_size), model.model_cfg.sequence_len

    # Read the first --split_tokens tokens of each split. The batch size does not change which tokens are read.
    for split, files in (("train", source.train_files), ("val", source.val_files)):
        start = time.monotonic()
        loader = dataloader.val_batches(files, model.tokenizer, rows, seq_len, cfg.split_tokens, packing=packing)
        with Progress(f"{split}, batches", -(-cfg.split_tokens // (rows * seq_len))) as progress:
            result = bits_per_byte(eval_model, advancing(loader, progress))
        loader.close()
        print(f"{split} bits per byte: {result} of {source.name}", flush=True)
        if result.rows < cfg.split_tokens // seq_len:
            print(f"  all of {split}: it has less than --split_tokens={cfg.split_tokens}")
        seconds = time.monotonic() - start
        metric = Metric(f"{split}_bpb", result.bpb, result.tokens, baseline=None, seconds=seconds, stderr=result.stderr)
        log_score(model, "bpb", metric, rows=result.rows)

    for prompt, text in complete(model.params, model.model_cfg, model.tokenizer, eval_model.dtype):
        print(f"  {prompt + text!r}")
        run_log.append(model.run_dir, "sample", model.stage, model.step, task=prompt, text=text)


def choose_source(meta: dict, cfg: config.BaseLoss) -> "Source":
    """Returns the text that --data or --data_dir names. The default is the text that the run was trained on.

    Prints a warning if the run was trained on a different text.
    """
    from nanochat_jax.data import hub, sources

    trained, settings = meta.get("text", {}), meta["config"]
    if cfg.data or cfg.data_dir:
        source = sources.open(cfg.data, cfg.data_dir)
    else:
        # Earlier versions did not record the folder of the text. If the run's settings do not name the folder either,
        # `sources.open` chooses the text that the tokenizer was trained on.
        data_dir = trained.get("data_dir") or settings.get("data_dir")
        known = not data_dir and trained.get("source") in ("local", *hub.SOURCES)
        source = sources.open(trained["source"] if known else settings.get("data"), data_dir)
    present = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    changed = [key for key in present if present[key] != trained.get(key, present[key])]
    if changed:
        print(f"not the text the run was trained on (different {', '.join(changed)}): compare with care")
    return source


def advancing(batches: "Iterable[dict[str, np.ndarray]]", progress: "Progress") -> "Iterator[dict[str, np.ndarray]]":
    """Yields the batches, and counts them on a progress bar."""
    for batch in batches:
        yield batch
        progress.advance()


if __name__ == "__main__":
    commandline.run(main, config.BaseLoss)
