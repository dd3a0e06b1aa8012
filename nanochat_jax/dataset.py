"""The command that downloads, builds or converts pretraining text, and downloads the data of the later stages.

Example: python -m nanochat_jax.dataset -n 240

The work is done in nanochat_jax/data.
"""

import sys
from typing import Any

from nanochat_jax import commandline, config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, sources


def main(cfg: config.Dataset) -> None:
    """Gets the text that `cfg` names. If `cfg.tokenize` is true, also caches the tokens of the text for training."""
    if not cfg.data_dir and cfg.data != "local":
        hub.download(cfg.data, cfg.num_files, cfg.num_workers, cfg.verify, begin=cfg.begin)
    source = sources.open(cfg.data, cfg.data_dir or None)
    train, val = len(source.train_files), len(source.val_files)
    print(f"{source.name}: {train} training and {val} validation files in {source.val_files[0].parent}")
    if cfg.tokenize:
        from nanochat_jax.data import token_cache
        from nanochat_jax.tokenizer import Tokenizer

        token_cache.build(source, Tokenizer.load(config.base_dir() / "tokenizer"))
    if cfg.tasks:
        download_tasks(cfg.preset_path)


def download_tasks(preset: str) -> None:
    """Downloads the conversations, problems and CORE items of the stages after pretraining, with the preset's settings.

    Otherwise, each stage would download its data when it starts, and the devices would wait. If something cannot be
    downloaded, prints a warning. The stage that needs it tries again.
    """
    from nanochat_jax import tasks
    from nanochat_jax.evals import bundle, chat

    flags = [f"--config={preset}"] if preset else []
    mid, sft = commandline.parse(config.Mid, flags), commandline.parse(config.Sft, flags)
    rl = commandline.parse(config.Rl, flags)
    evaluation = commandline.parse(config.ChatEval, flags)
    wanted: list[tuple[Any, str, str]] = [(cfg, name, "train") for cfg in (mid, sft, rl) for name in cfg.mixture]
    wanted += [(cfg, name, "val") for cfg in (mid, sft) for name in cfg.val_mixture]
    wanted += [(rl, name, "val") for name in rl.mixture]
    wanted += [(evaluation, name, evaluation.split) for name in chat.CHATCORE_TASKS]
    done = set()
    for settings, name, split in wanted:
        task_files = settings.task_files or sft.task_files
        if (job := (name.lower(), split, settings.task_data_dir, task_files)) in done:
            continue
        done.add(job)
        try:
            tasks.load(name, split, data_dir=settings.task_data_dir, task_files=task_files)
        except UserError as error:
            print(f"warning: {name} ({split}) could not be downloaded in advance: {error}", file=sys.stderr, flush=True)
    try:
        bundle.find_bundle()
    except UserError as error:
        print(f"warning: CORE could not be downloaded in advance: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    commandline.run(main, config.Dataset)
