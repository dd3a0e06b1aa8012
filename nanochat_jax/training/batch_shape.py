"""Splits the tokens of an optimizer step into rows and micro-batches, and finds how many rows fit on a device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.parallel import processes, sharding

MIB = 2**20

# -----------------------------------------------------------------------------
# How a step's tokens are split


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are arranged.

    grad_accum_steps  micro-batches per step, computed one after another; their gradients are summed
    rows              rows that one replica computes at once, in one micro-batch
    replicas          copies of the model, computing side by side; each is one device or a group along the model axis
    seq_len           tokens per row
    padding           rows without targets, after all other rows of the step

    Example: a step has 524,288 tokens in rows of 2048, and each of 8 devices computes 16 rows at once. Its shape is
    BatchShape(grad_accum_steps=2, rows=16, replicas=8, seq_len=2048), with 2 x 16 x 8 = 256 rows.
    """

    grad_accum_steps: int
    rows: int
    replicas: int
    seq_len: int
    padding: int = 0

    @property
    def total_rows(self) -> int:
        """The number of rows per step, without padding rows."""
        return self.grad_accum_steps * self.rows * self.replicas - self.padding

    @property
    def tokens(self) -> int:
        """The number of tokens per step, without padding rows."""
        return self.total_rows * self.seq_len

    def __str__(self) -> str:
        return f"{self.grad_accum_steps} gradient accumulation steps x {self.rows} rows x {self.replicas} replicas"

    def shaped(self, batch: dict[str, np.ndarray], mesh: Mesh, vocab_size: int) -> dict[str, jax.Array]:
        """Puts this process's rows [rows, t] on the devices, as global arrays [grad_accum_steps, all rows of a
        micro-batch, t].

        Raises UserError if a token id is outside the vocabulary, because a device would silently use another id.
        """
        _check_ids("inputs", batch["inputs"], 0, vocab_size)
        _check_ids("targets", batch["targets"], -1, vocab_size)  # -1: no target
        local = {k: v.reshape(self.grad_accum_steps, -1, v.shape[-1]) for k, v in batch.items()}
        return {k: sharding.put_rows(mesh, v) for k, v in local.items()}


def _check_ids(name: str, ids: np.ndarray, low: int, vocab_size: int) -> None:
    """Raises UserError unless all ids are at least `low` and below `vocab_size`."""
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest >= low and largest < vocab_size:
        return
    wrong = largest if largest >= vocab_size else smallest
    raise UserError(
        f"token id {wrong} among the {name} is outside the vocabulary of {vocab_size:,}: "
        "the tokenizer is not the one this model was made for"
    )


def shape_for_tokens(
    total_batch_size: int, device_batch_size: int, seq_len: int, replicas: int, fit: Callable[[int], int]
) -> BatchShape:
    """Splits `total_batch_size` tokens into rows and micro-batches.

    A replica computes `device_batch_size` rows at once or, if `device_batch_size` is 0, `fit(rows)` rows, where `rows`
    is the number of rows per replica in a step. Raises UserError if the tokens do not divide evenly into rows on all
    replicas, or if the rows of a replica do not divide evenly into micro-batches.

    Example: (524288, 16, 2048, 8, fit) -> BatchShape(2, 16, 8, 2048).
    """
    rows, rest = divmod(total_batch_size, seq_len * replicas)
    if rest:
        near = max(1, round(total_batch_size / (seq_len * replicas))) * seq_len * replicas
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of {seq_len} tokens x {replicas} devices: "
            f"try {near}"
        )
    if device_batch_size == 0:
        device_batch_size = fit(rows)
    if rows % device_batch_size:
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {rows} rows per device "
            f"(--total_batch_size={total_batch_size} / {seq_len} tokens / {replicas} devices): "
            f"try {math.gcd(rows, device_batch_size)}"
        )
    return BatchShape(rows // device_batch_size, device_batch_size, replicas, seq_len)


def shape_for_rows(
    total_rows: int, device_batch_size: int, seq_len: int, replicas: int, fit: Callable[[int], int]
) -> BatchShape:
    """Splits `total_rows` rows over any number of replicas. Padding rows are added if the rows do not divide evenly.

    `device_batch_size` and `fit` are as in `shape_for_tokens`, except that a replica with fewer than
    `device_batch_size` rows computes all of its rows at once.

    Example: 50 rows on 8 replicas that each compute 4 rows at once -> BatchShape(2, 4, 8, seq_len, padding=14).
    """
    share = math.ceil(total_rows / replicas)
    rows = min(device_batch_size, share) or fit(share)
    grad_accum_steps = math.ceil(share / rows)
    padding = grad_accum_steps * rows * replicas - total_rows
    return BatchShape(grad_accum_steps, rows, replicas, seq_len, padding)


def rows_of_examples(examples: int, mean_length: float, seq_len: int) -> int:
    """Returns how many rows of `seq_len` tokens hold `examples` conversations, which have `mean_length` tokens on
    average.

    The result does not depend on the number of devices, because another batch size would change the recipe. Example: 32
    conversations of 100 tokens in rows of 64 tokens -> 50.
    """
    return math.ceil(examples * mean_length / seq_len)


# -----------------------------------------------------------------------------
# How many rows fit


def rows_that_fit(model_cfg: GPTConfig, rows: int, need: Callable[[int, int], int], limit: int | None = None) -> int:
    """Returns how many rows a device can compute at once: the largest divisor of `rows` that fits in memory.

    `rows` is the number of rows that the device computes in a step. `need(grad_accum_steps, n)` returns the peak
    memory, in bytes, of a step that computes n rows at once. `limit` is the available memory in bytes. The default is
    95% of a device's memory, the minimum over all processes. If no `limit` is given and the device is a CPU or does not
    report its memory, the result is the largest divisor that gives at most 8,192 tokens, because a CPU gains nothing
    from more tokens. Raises UserError if not even one row fits.

    Each call of `need` compiles a step, so the search makes few calls. To find a likely number of rows, it uses
    `estimated_memory`, which compiles nothing but is rough, and ignores what --shard and --remat save. The search
    starts at the largest divisor that is at most twice the likely number. If this divisor fits, larger divisors are
    tried until one does not fit. Otherwise, smaller divisors are tried until one fits.
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if limit is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
            return max(n for n in divisors if n <= max(1, 8192 // model_cfg.sequence_len))
        limit = processes.all_min(int(0.95 * stats["bytes_limit"]) // MIB) * MIB  # in MiB, as all_min sends an int32

    likely = 1
    while 2 * likely <= rows and estimated_memory(model_cfg, 2 * likely) <= limit:
        likely *= 2
    start = max(n for n in divisors if n <= 2 * likely)

    best = needed = 0
    for n in [n for n in divisors if n >= start]:
        needed = need(rows // n, n)
        if needed > limit:
            break
        best = n
    if best:
        return best
    for n in reversed([n for n in divisors if n < start]):
        needed = need(rows // n, n)
        if needed <= limit:
            return n
    raise UserError(
        f"one row of {model_cfg.sequence_len} tokens needs {needed / 2**30:.1f} GiB, "
        f"the device has {limit / 2**30:.1f}: try --remat=full or --shard=full, or a smaller --max_seq_len"
    )


def estimated_memory(model_cfg: GPTConfig, rows: int) -> int:
    """Returns a rough estimate, without compiling, of the bytes that one device needs for a step with `rows` rows at
    once.

    The estimate counts weights, gradients and optimizer state (16 bytes per parameter), one chunk of logits, and about
    17 activation vectors per layer and token. An activation vector has the model's width and takes two bytes per
    number.
    """
    activations = 2 * 17 * model_cfg.n_layer * model_cfg.n_embd * model_cfg.sequence_len * rows
    return 16 * model_cfg.num_params + 12 * 8192 * model_cfg.padded_vocab + activations
