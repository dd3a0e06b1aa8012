"""A model that follows a script: its weights make each token of a line be followed by the next one."""

import itertools

import jax.numpy as jnp

from nanochat_jax.model import gpt


def scripted(params, model_cfg, tokenizer, *lines):
    """`params` with weak blocks and a head that makes the next token of each of `lines` almost certain."""
    blocks = {name: w * 0.1 for name, w in params["blocks"].items()}  # a little attention remains
    direction = gpt.norm(params["wte"], model_cfg.norm_eps)
    head = jnp.zeros_like(params["lm_head"])
    for line in lines:
        ids = line_ids(tokenizer, line)
        for token, following in itertools.pairwise(ids):
            head = head.at[following].add(direction[token] * 0.5)
    return params | {"blocks": blocks, "lm_head": head}


def line_ids(tokenizer, line: list[str]) -> list[int]:
    """Words -> token ids: special tokens by name, any other word byte by byte. ["a", "<|bos|>"] -> [97, bos]."""
    special = {name: [tokenizer.special(name)] for name in line if name.startswith("<|")}
    return [i for word in line for i in special.get(word, word.encode())]
