"""How the tokens of an optimizer step are split into rows and micro-batches, and how many rows fit on a device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.parallel import processes, sharding

MIB = 2**20

# -----------------------------------------------------------------------------
# How a step's tokens are cut


@dataclass(frozen=True)
class BatchShape:
    """A step's rows: `micro` micro-batches of `rows` rows on each of the replicas (devices, or groups of them along
    the model axis), `seq_len` tokens a row. The last `padding` of all rows are without targets."""

    grad_accum_steps: int
    rows: int
    replicas: int
    seq_len: int
    padding: int = 0

    @property
    def total_rows(self) -> int:
        """Those with something in them."""
        return self.grad_accum_steps * self.rows * self.replicas - self.padding

    @property
    def tokens(self) -> int:
        return self.total_rows * self.seq_len

    def __str__(self) -> str:
        return f"{self.grad_accum_steps} gradient accumulation steps x {self.rows} rows x {self.replicas} replicas"

    def shaped(self, batch: dict[str, np.ndarray], mesh, vocab_size: int) -> dict[str, jax.Array]:
        """[rows of this process, t] -> global arrays [micro, rows, t] on the devices.

        UserError for an id outside the vocabulary, which on the device would silently become another one.
        """
        for name, least in (("inputs", 0), ("targets", -1)):  # a target of -1 is not counted
            ids = batch[name]
            if (id := int(ids.max())) >= vocab_size or (id := int(ids.min())) < least:
                raise UserError(
                    f"token id {id} among the {name} is outside the vocabulary of {vocab_size:,}: "
                    "the tokenizer is not the one this model was made for"
                )
        local = {k: v.reshape(self.grad_accum_steps, -1, v.shape[-1]) for k, v in batch.items()}
        return {k: sharding.put_rows(mesh, v) for k, v in local.items()}


def batch_shape(
    total_batch_size: int, device_batch_size: int, seq_len: int, devices: int = 1,
    fit: Callable[[int], int] | None = None,
) -> BatchShape:  # fmt: skip
    """Cuts `total_batch_size` tokens into rows and micro-batches. UserError where it does not divide.

    `devices` is how many take rows of their own. A `device_batch_size` of 0 leaves it to `fit`, which says how many of
    a device's rows it can take at once.
    """
    rows, rest = divmod(total_batch_size, seq_len * devices)
    if rest:
        near = max(1, round(total_batch_size / (seq_len * devices))) * seq_len * devices
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of {seq_len} tokens x {devices} devices: "
            f"try {near}"
        )
    if device_batch_size == 0:
        device_batch_size = fit(rows)
    if rows % device_batch_size:
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {rows} rows a device "
            f"(--total_batch_size={total_batch_size} / {seq_len} tokens / {devices} devices): "
            f"try {math.gcd(rows, device_batch_size)}"
        )
    return BatchShape(rows // device_batch_size, device_batch_size, devices, seq_len)


def batch_shape_of_rows(
    total_rows: int, device_batch_size: int, seq_len: int, devices: int, fit: Callable[[int], int]
) -> BatchShape:
    """Cuts as many rows over any number of devices: what does not divide is made up with padding.

    `device_batch_size` and `fit` as in `geometry`, but that of a step with fewer rows a device takes those at once.
    """
    share = -(-total_rows // devices)
    rows = min(device_batch_size, share) or fit(share)
    grad_accum_steps = -(-share // rows)
    return BatchShape(grad_accum_steps, rows, devices, seq_len, padding=grad_accum_steps * rows * devices - total_rows)


def rows_of_examples(examples: int, mean_length: float, seq_len: int) -> int:
    """The rows that hold `examples` conversations of `mean_length` tokens: no matter how many devices there are, since
    another step is another recipe."""
    return math.ceil(examples * mean_length / seq_len)


# -----------------------------------------------------------------------------
# What fits


def rows_that_fit(model_cfg: GPTConfig, rows: int, need: Callable[[int, int], int], limit: int | None = None) -> int:
    """How many of a device's `rows` it can take at once: the most that divide them and whose step needs no more than
    `limit` bytes (default: the device's memory). On a CPU as many as make 8,192 tokens; more gain nothing.

    `need` says how many bytes a step of so many micro-batches of so many rows holds.
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if limit is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
            return max(n for n in divisors if n <= max(1, 8192 // model_cfg.sequence_len))
        limit = processes.all_min(int(0.95 * stats["bytes_limit"]) // MIB) * MIB
    # To know what a step needs means to compile it. Twice what is likely to fit is the first to be tried.
    likely = 1
    while 2 * likely <= rows and estimated_memory(model_cfg, 2 * likely) <= limit:
        likely *= 2
    at = max(i for i, n in enumerate(divisors) if n <= 2 * likely)
    used = {}

    def fits(n: int) -> bool:
        used[n] = need(rows // n, n)
        return used[n] <= limit

    if fits(divisors[at]):  # the estimate knows nothing of what --shard and --remat save
        while at + 1 < len(divisors) and fits(divisors[at + 1]):
            at += 1
        return divisors[at]
    for n in reversed(divisors[:at]):
        if fits(n):
            return n
    raise UserError(
        f"one row of {model_cfg.sequence_len} tokens needs {used[1] / 2**30:.1f} GiB, "
        f"the device has {limit / 2**30:.1f}: try --remat=full or --shard=full, or a smaller --max_seq_len"
    )


def estimated_memory(model_cfg: GPTConfig, rows: int) -> int:
    """Bytes, without compiling: weights, gradients and optimizer state, a chunk of logits, and about 17 activations of
    the width a layer and token, in two bytes each."""
    activations = 2 * 17 * model_cfg.n_layer * model_cfg.n_embd * model_cfg.sequence_len * rows
    return 16 * model_cfg.num_params + 12 * 8192 * model_cfg.padded_vocab + activations
