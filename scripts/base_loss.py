"""Bits per byte of a model on training and validation text, and seven samples.

    python -m scripts.base_loss
    python -m scripts.base_loss -g d20 --split_tokens=1e6

Adds to the log of the run that is judged. Text and packing are those the run was trained with, unless others are named.
"""

from nanochat_jax import commandline, config


def main(cfg: config.BaseLoss) -> None:
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    import time

    import jax

    from nanochat_jax import checkpoint, run_log
    from nanochat_jax.data import dataloader
    from nanochat_jax.evals.batching import num_rows
    from nanochat_jax.evals.bpb import bits_per_byte
    from nanochat_jax.parallel import sharding
    from nanochat_jax.progress import Progress
    from nanochat_jax.training.validation import complete

    model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
    dtype = devices.choose_precision(cfg.compute_dtype, model_cfg=model.model_cfg)
    source = text_of(model.meta, cfg)
    packing = model.meta["config"].get("packing", "split")
    params = jax.device_put(model.params, sharding.replicated(sharding.make_mesh()))
    rows = num_rows(params, cfg.device_batch_size)

    # The same tokens every time, whatever the batch: the first ones of each split.
    for split, files in (("train", source.train_files), ("val", source.val_files)):
        start = time.monotonic()
        loader = dataloader.val_batches(
            files, model.tokenizer, rows, model.model_cfg.sequence_len, cfg.split_tokens, packing=packing
        )
        with Progress(f"{split}, batches", -(-cfg.split_tokens // (rows * model.model_cfg.sequence_len))) as progress:
            counted = Counted(loader, progress)
            bpb = bits_per_byte(params, model.model_cfg, counted, model.tokenizer.token_bytes(), dtype)
        loader.close()
        print(f"{split} bits per byte: {bpb:.6f} ({counted.tokens:,} tokens of {source.name})", flush=True)
        run_log.append(
            model.run_dir, "eval", model.stage, model.step, task=f"{split}_bpb", suite="bpb", score=bpb, stderr=None,
            n=counted.tokens, baseline=None, seconds=round(time.monotonic() - start, 3),
        )  # fmt: skip

    for prompt, text in complete(model.params, model.model_cfg, model.tokenizer, dtype):
        print(f"  {prompt}{text!r}")
        run_log.append(model.run_dir, "sample", model.stage, model.step, task=prompt, text=text)


def text_of(meta: dict, cfg: config.BaseLoss):
    """The text that is asked for, else that of the checkpoint. Says so where it is not what the run was trained on."""
    from nanochat_jax.data import hub, sources

    trained, settings = meta.get("text", {}), meta["config"]
    if cfg.data or cfg.data_dir:
        source = sources.open(cfg.data, cfg.data_dir)
    elif trained.get("source") in ("local", *hub.SOURCES) and not settings.get("data_dir"):
        source = sources.open(trained["source"])
    else:  # a folder, which the run named or has from the tokenizer
        source = sources.open(settings.get("data"), settings.get("data_dir"))
    here = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    if changed := ", ".join(key for key in here if here[key] != trained.get(key, here[key])):
        print(f"not the text the run was trained on (other {changed}): compare with care")
    return source


class Counted:
    """The batches of a loader, their counted targets added up on the way."""

    def __init__(self, batches, progress):
        self.batches, self.progress, self.tokens = batches, progress, 0

    def __iter__(self):
        for batch in self.batches:
            self.tokens += int((batch["targets"] >= 0).sum())
            yield batch
            self.progress.advance()


if __name__ == "__main__":
    commandline.run(main, config.BaseLoss)
