"""Splits the tokens of an optimizer step into rows and micro-batches, and finds how many rows fit on a device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model import attention
from nanochat_jax.parallel import processes, sharding
from nanochat_jax.progress import count_of

KIB = 2**10
USABLE = 0.95  # the share of the memory that JAX may allocate which a step may take

# -----------------------------------------------------------------------------
# How a step's tokens are split


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are split into micro-batches and over replicas.

    Example: a step of 524,288 tokens has 256 rows of 2,048 tokens. If each of 8 devices computes 16 rows at once, the
    step needs 2 micro-batches: BatchShape(grad_accum_steps=2, rows=16, replicas=8, seq_len=2048).
    """

    grad_accum_steps: int  # micro-batches per step; their gradients are summed
    rows: int  # rows per replica in one micro-batch
    replicas: int  # copies of the model that compute in parallel, each on one or more devices
    seq_len: int  # tokens per row
    padding: int = 0  # rows without targets, added so that every micro-batch is full

    @property
    def total_rows(self) -> int:
        """The number of rows per step, without padding rows."""
        return self.grad_accum_steps * self.rows * self.replicas - self.padding

    @property
    def tokens(self) -> int:
        """The number of tokens per step, without padding rows."""
        return self.total_rows * self.seq_len

    def __str__(self) -> str:
        steps = count_of(self.grad_accum_steps, "gradient accumulation step")
        return f"{steps} x {count_of(self.rows, 'row')} x {count_of(self.replicas, 'replica')}"

    def shaped(self, batch: dict[str, np.ndarray], mesh: Mesh, vocab_size: int) -> dict[str, jax.Array]:
        """Turns this process's rows [rows, t] into global arrays [grad_accum_steps, rows of a micro-batch, t].

        Raises UserError if a token id is outside the vocabulary. Without this check, a device would silently use
        another id.
        """
        _check_ids("inputs", batch["inputs"], 0, vocab_size)
        _check_ids("targets", batch["targets"], -1, vocab_size)  # -1 means no target
        local = {k: v.reshape(self.grad_accum_steps, -1, v.shape[-1]) for k, v in batch.items()}
        return {k: sharding.put_rows(mesh, v) for k, v in local.items()}


def _check_ids(name: str, ids: np.ndarray, low: int, vocab_size: int) -> None:
    """Raises UserError unless low <= id < vocab_size for every id."""
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

    Each replica computes `device_batch_size` rows at once. If `device_batch_size` is 0, it is replaced by fit(n), where
    n is the number of rows per replica. Raises UserError unless every replica gets the same number of whole rows and
    can split them into equal micro-batches.

    Example: shape_for_tokens(524288, 16, 2048, 8, fit) returns BatchShape(2, 16, 8, 2048).
    """
    rows, rest = divmod(total_batch_size, seq_len * replicas)
    if rest:
        near = max(1, round(total_batch_size / (seq_len * replicas))) * seq_len * replicas
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of {seq_len} tokens x "
            f"{count_of(replicas, 'replica')}: try {near}"
        )
    if device_batch_size == 0:
        device_batch_size = fit(rows)
    if rows % device_batch_size:
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {count_of(rows, 'row')} per replica "
            f"(--total_batch_size={total_batch_size} / {seq_len} tokens / {count_of(replicas, 'replica')}): "
            f"try {math.gcd(rows, device_batch_size)}"
        )
    return BatchShape(rows // device_batch_size, device_batch_size, replicas, seq_len)


def shape_for_rows(
    total_rows: int, device_batch_size: int, seq_len: int, replicas: int, fit: Callable[[int], int]
) -> BatchShape:
    """Splits `total_rows` rows over the replicas. Padding rows are added if the rows do not divide evenly.

    `device_batch_size` and `fit` work as in `shape_for_tokens`. A replica with fewer than `device_batch_size` rows
    computes all its rows at once.

    Example: shape_for_rows(50, 4, 2048, 8, fit) returns BatchShape(2, 4, 8, 2048, padding=14).
    """
    share = math.ceil(total_rows / replicas)
    rows = min(device_batch_size, share) or fit(share)
    grad_accum_steps = math.ceil(share / rows)
    padding = grad_accum_steps * rows * replicas - total_rows
    return BatchShape(grad_accum_steps, rows, replicas, seq_len, padding)


def rows_of_examples(examples: int, mean_length: float, seq_len: int) -> int:
    """Returns how many rows are filled by `examples` conversations with a mean length of `mean_length` tokens.

    The result does not depend on the number of replicas, so the batch size is the same on every machine.

    Example: 32 conversations of 100 tokens fill 50 rows of 64 tokens.
    """
    return math.ceil(examples * mean_length / seq_len)


# -----------------------------------------------------------------------------
# How many rows fit


def memory_limit() -> int | None:
    """Returns how many bytes a step may take on a device, a share of the device's memory.

    If the processes have different devices, the smallest memory counts. Returns None on a CPU, which gains nothing from
    many rows, and for a device that does not report its memory.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
        return None
    return processes.all_min(int(USABLE * stats["bytes_limit"]) // KIB) * KIB  # in KiB, because bytes overflow int32


def possible_rows(model_cfg: GPTConfig, rows: int) -> list[int]:
    """Returns, in increasing order, the divisors of `rows` that the attention kernel can compute at once."""
    most = attention.most_rows(model_cfg)
    return [n for n in range(1, min(rows, rows if most is None else most) + 1) if rows % n == 0]


def rows_that_fit(model_cfg: GPTConfig, rows: int, need: Callable[[int, int], int], limit: int | None) -> int:
    """Returns how many rows a replica can compute at once.

    `rows` is the number of rows that the replica computes in a step. The result is the largest divisor n of `rows` such
    that n rows fit in memory. `need(grad_accum_steps, n)` returns the peak memory, in bytes, of a step that computes n
    rows at once. `limit` is the available memory in bytes (see `memory_limit`). Raises UserError if a single row does
    not fit.

    Without a limit, at most 8,192 tokens are computed at once.

    Calling `need` may compile a step, so the search calls it only a few times. The search begins with a rough guess of
    the result. The guess comes from `estimated_memory`, which compiles nothing and ignores the memory that --shard and
    --remat save. The first n to be tried is the largest divisor that is at most twice the guess. If n rows fit, larger
    divisors are tried until one is too large. Otherwise, smaller divisors are tried until one is small enough.
    """
    divisors = possible_rows(model_cfg, rows)
    if limit is None:
        return max(n for n in divisors if n <= max(1, 8192 // model_cfg.sequence_len))

    def largest_need(n: int) -> int:
        """All processes must choose the same n, so the process that needs the most memory decides."""
        return processes.all_max(math.ceil(need(rows // n, n) / KIB)) * KIB

    likely = 1
    while 2 * likely <= rows and estimated_memory(model_cfg, 2 * likely) <= limit:
        likely *= 2
    start = max(n for n in divisors if n <= 2 * likely)

    best = needed = 0
    for n in [n for n in divisors if n >= start]:
        needed = largest_need(n)
        if needed > limit:
            break
        best = n
    if best:
        return best
    for n in reversed([n for n in divisors if n < start]):
        needed = largest_need(n)
        if needed <= limit:
            return n
    raise UserError(
        f"one row of {model_cfg.sequence_len} tokens needs {needed / 2**30:.1f} GiB, "
        f"the device has {limit / 2**30:.1f}: try --remat=full or --shard=full, or a smaller --max_seq_len"
    )


def estimated_memory(model_cfg: GPTConfig, rows: int) -> int:
    """Returns roughly how many bytes a device needs to compute `rows` rows at once.

    Weights, gradients and optimizer state take 16 bytes per parameter. The estimate adds the logits of one chunk of
    8,192 tokens (see `cross_entropy`). It also adds about 17 activation vectors per layer and token. An activation
    vector has `n_embd` elements of two bytes each.
    """
    activations = 2 * 17 * model_cfg.n_layer * model_cfg.n_embd * model_cfg.sequence_len * rows
    return 16 * model_cfg.num_params + 12 * 8192 * model_cfg.padded_vocab + activations
