"""Loaders over small tasks and files, and their batches."""

import numpy as np
from fake_tokenizer import FakeTokenizer

from nanochat_jax.data import dataloader

TOKENIZER = FakeTokenizer()
T = 16  # tokens per row
KINDS = ["split", "crop", "stream", "mid", "sft"]


class Task(list):
    """Conversations of one exchange; the answer to question i repeats the number 1000 + i."""

    def __init__(self, n, answer=lambda i: 1 + i % 5, question=lambda i: 1 + i % 3):
        for i in range(n):
            user = {"role": "user", "content": " ".join(["12"] * question(i))}
            assistant = {"role": "assistant", "content": " ".join([str(1000 + i)] * answer(i))}
            self.append({"messages": [user, assistant]})


def take(loader, n=None):
    batches = []
    while n is None or len(batches) < n:
        try:
            batches.append(next(loader))
        except StopIteration:
            break
    loader.close()
    return batches


def flat(batches, key):
    return np.concatenate([b[key] for b in batches])


def make(kind, files, **kwargs):
    if kind in ("mid", "sft"):
        return dataloader.chat_loader(Task(50), TOKENIZER, 4, T, supervise="all" if kind == "mid" else "mask", **kwargs)
    return dataloader.base_loader(files, TOKENIZER, 4, T, packing=kind, **kwargs)
