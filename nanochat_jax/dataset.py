"""The command that downloads, builds or converts pretraining text: python -m nanochat_jax.dataset -n 240.

The work is done in nanochat_jax/data.
"""

from nanochat_jax import commandline, config
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


if __name__ == "__main__":
    commandline.run(main, config.Dataset)
