"""How many steps a run takes, and how often it then reads its text or its conversations."""

import math
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import config, progress
from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.data import documents, hub, sources, token_cache
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Amount:
    """How much training text a source has, including the shards that were requested but are not here yet."""

    source: sources.Source
    tokens: float  # estimated number of tokens in all training files
    none_here: bool  # whether all training files are still downloading
    num_cached: int  # number of files whose tokens are in the token cache

    @classmethod
    def of(cls, source: sources.Source, tokenizer: Tokenizer, cache_dir: Path) -> "Amount":
        files = source.train_files
        tokens = documents.epoch_tokens(files, tokenizer, cache_dir)
        if none_here := math.isnan(tokens):  # assume that training files are as large as validation files
            of_val = documents.epoch_tokens(source.val_files, tokenizer, cache_dir)
            tokens = of_val / len(source.val_files) * len(files)
        return cls(source, max(1.0, tokens), none_here, token_cache.num_cached(files, cache_dir))

    def describe(self, tokens: int) -> str:
        """Describes the text, and says how much of it a run of `tokens` tokens will read.

        Example: "fineweb-edu, 240 files of about 54.0M tokens; this run reads 208 of them, 0.86 epochs"
        """
        count, epochs = len(self.source.train_files), tokens / self.tokens
        per_file = progress.short(self.tokens / count)
        text = f"{self.source.name}, {progress.count_of(count, 'file')} of about {per_file} tokens"
        text += ", none of them here yet" if self.none_here else ""
        text += f", {self.num_cached} of them already tokenized" if self.num_cached else ""
        text += f"; this run reads {min(count, math.ceil(epochs * count))} of them, {epochs:.2f} epochs"
        # Up to 4 epochs of the same text are about as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
        return text + (" (more than 4: new text would teach more)" if epochs > 4 else "")

    def check(self, max_epochs: float, steps: int, tokens_per_step: int) -> None:
        """Raises UserError if `steps` steps would read the text more than `max_epochs` times."""
        tokens = steps * tokens_per_step
        epochs = tokens / self.tokens
        if epochs <= max_epochs:
            return
        name, count = self.source.name, len(self.source.train_files)
        more = "get more text (python -m nanochat_jax.dataset -n 240, then scripts.tok_train --data=fineweb-edu)"
        if name in hub.SOURCES and self.source.folder is None:
            wanted = min(hub.SOURCES[name][1], math.ceil(epochs * count))
            more = f"download more (python -m nanochat_jax.dataset --data={name} -n {wanted})"
        fewer = int(max_epochs * self.tokens) // tokens_per_step
        shorter = f"train fewer steps (--num_iterations={fewer}), " if fewer else ""
        raise UserError(
            f"{epochs:,.1f} passes over the {progress.short(self.tokens)} tokens of {name} are more than "
            f"--max_epochs={max_epochs:g}: {more}, {shorter}or allow it (--max_epochs={math.ceil(epochs)})"
        )


def horizon(cfg: config.Base, model_cfg: GPTConfig, tokens: int) -> int:
    """Returns the number of optimizer steps, with `tokens` tokens per step.

    The first of these settings that is set decides: --num_iterations, --target_flops, --target_param_data_ratio. Raises
    UserError if the result is below 1.
    """
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = round(cfg.target_flops / (model_cfg.flops_per_token * tokens))
    else:
        steps = int(cfg.target_param_data_ratio * model_cfg.num_params) // tokens
    if steps < 1:
        ratio = "--target_flops" if cfg.target_flops > 0 else "--target_param_data_ratio"
        raise UserError(
            f"the horizon comes to {steps} steps of {tokens:,} tokens: lower --total_batch_size, raise {ratio}, or set "
            "--num_iterations=N"
        )
    return steps


def check_epochs(cfg: config.Mid | config.Sft, epochs: float, count: int) -> None:
    """Raises UserError if --num_iterations asks for too many passes over a mixture of `count` conversations.

    --num_epochs says the number of passes itself, so it may be larger than --max_epochs.
    """
    most = max(cfg.max_epochs, cfg.num_epochs if isinstance(cfg, config.Sft) else 0)
    if epochs <= most:
        return
    fewer = int(cfg.num_iterations * most / epochs)
    shorter = f"train fewer steps (--num_iterations={fewer}), " if fewer else ""
    passes = f"{epochs:,.1f} passes over the {progress.count_of(count, 'conversation')}"
    raise UserError(
        f"--num_iterations={cfg.num_iterations}: {passes} of --mixture are more than --max_epochs={cfg.max_epochs:g}: "
        f"add conversations, {shorter}or allow it (--max_epochs={math.ceil(epochs)})"
    )


def describe_epochs(epochs: float, cfg: config.Mid | config.Sft | config.Rl) -> str:
    """Describes how often a run reads its mixture: "about 0.86". Says so if a value of --num_epochs is not used."""
    if cfg.num_iterations <= 0:
        return f"{epochs:.3g}"
    num_epochs = 1 if isinstance(cfg, config.Mid) else cfg.num_epochs
    unused = f"; --num_epochs={num_epochs} is not used, because --num_iterations is given" if num_epochs != 1 else ""
    return f"about {epochs:,.2f}{unused}"
