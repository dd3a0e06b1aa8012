"""One optimizer step: what is compiled, and how its tokens are cut into rows and micro-batches."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.config import GPTConfig, Train, UserError
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import cross_entropy, num_chunks
from nanochat_jax.parallel import processes, sharding
from nanochat_jax.parallel.sharding import Layout

MIB = 2**20

# -----------------------------------------------------------------------------
# The step


class TrainState(NamedTuple):
    params: gpt.Params
    opt_state: optax.OptState


def make_step(
    model: GPTConfig, optimizer: optax.GradientTransformation, dtype, grad_clip: float = 0.0,
    layout: Layout | None = None, execution: gpt.Execution = gpt.PLAIN,
) -> Callable:  # fmt: skip
    """step(state, batch, lr_mult) -> (state, metrics), jitted, its state donated.

    batch: inputs, targets int32 [micro, rows, t] (targets -1: not counted), optionally weights float32 of the same
    shape, one a target, and `stop` int32 [devices], whose sum comes back among the metrics. The loss is the sum over
    all micro-batches and devices divided by the number of counted tokens, so that how a batch is cut changes nothing
    but rounding; no counted token gives a loss of 0.

    With the optimizer sharded, the gradients of a replica's rows stay with it through all micro-batches (by a vmap over
    the replicas) and are reduced once, each replica keeping its share; with the weights sharded, once a micro-batch.
    """
    replicas = sharding.replicas(layout.mesh) if layout else 1
    apart = replicas > 1 and not layout.full
    if layout:
        execution = dataclasses.replace(execution, gather=layout.gather)

    def loss_sum(params, batch):
        x = gpt.hidden(params, model, batch["inputs"], dtype, execution)
        head = execution.gather("lm_head", params["lm_head"])[: model.vocab_size]
        rows, time = batch["targets"].shape
        weights = batch.get("weights", jnp.ones((rows, time), jnp.float32))
        chunks = num_chunks(rows if apart else rows // replicas, time)  # of what one device holds
        return cross_entropy(x, head, batch["targets"], weights, model.softcap, chunks)

    def gradients(params, batch):
        """(sum of losses, its gradient); over one micro-batch, or as many as the batch has."""
        gradient_of = jax.value_and_grad(loss_sum)
        if apart:
            gradient_of = jax.vmap(gradient_of, in_axes=(None, 0), spmd_axis_name=sharding.ROWS)
            batch = layout.by_replica(batch)
        if batch["targets"].shape[0] == 1:
            return gradient_of(params, jax.tree.map(lambda x: x[0], batch))

        def accumulate(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient_of(params, micro_batch)), None

        like = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], batch))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        if apart:
            zero = layout.own(zero)
        return jax.lax.scan(accumulate, zero, batch)[0]

    def step(state: TrainState, batch: dict, lr_mult: jax.Array):
        params = state.params
        stop = batch.get("stop")
        loss, grads = gradients(params, {k: v for k, v in batch.items() if k != "stop"})
        if apart:
            loss, grads = loss.sum(), layout.reduce(grads)
        count = (batch["targets"] >= 0).sum()
        scale = 1.0 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        if grad_clip > 0:
            # Over the global gradient; the specification clips every rank's own, which depends on how many there are.
            # Off by default: the norm does not pass 1 in these runs, and clipping costs about 2% of the speed.
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, grad_clip / (grad_norm + 1e-6)), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        if layout:
            updates = layout.constrain(updates, layout.param_specs(updates))
            opt_state = layout.constrain(opt_state, layout.shard_specs(opt_state))
        params = jax.tree.map(lambda p, u: p + lr_mult * u, params, updates)
        results = {"loss": loss * scale, "grad_norm": grad_norm, "count": count}
        return TrainState(params, opt_state), results if stop is None else results | {"stop": stop.sum()}

    return jax.jit(step, donate_argnums=0)


def execution(cfg: Train) -> gpt.Execution:
    """How the stage's settings want the blocks computed."""
    kept = jax.checkpoint_policies
    known = {"none": None, "matmuls": kept.save_only_these_names(gpt.MATMUL), "full": kept.nothing_saveable}
    if cfg.remat not in known:
        raise UserError(f"--remat={cfg.remat}: must be one of {', '.join(known)}")
    policy = known[cfg.remat]
    if policy is None and cfg.shard == "full":  # a weight is gathered again for the backward pass
        policy = kept.save_anything_except_these_names(sharding.GATHERED)
    return gpt.Execution(cfg.scan_layers, policy)


# -----------------------------------------------------------------------------
# How a step's tokens are cut


@dataclass(frozen=True)
class Geometry:
    """A step's rows: `micro` micro-batches of `rows` rows on each of the replicas (devices, or groups of them along
    the model axis), `seq_len` tokens a row. The last `padding` of all rows are without targets."""

    micro: int
    rows: int
    replicas: int
    seq_len: int
    padding: int = 0

    @property
    def total_rows(self) -> int:
        """Those with something in them."""
        return self.micro * self.rows * self.replicas - self.padding

    @property
    def tokens(self) -> int:
        return self.total_rows * self.seq_len

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
        local = {k: v.reshape(self.micro, -1, v.shape[-1]) for k, v in batch.items()}
        return {k: sharding.put_rows(mesh, v) for k, v in local.items()}


def geometry(
    total_batch_size: int, device_batch_size: int, seq_len: int, devices: int = 1,
    fit: Callable[[int], int] | None = None,
) -> Geometry:  # fmt: skip
    """Cuts `total_batch_size` tokens into rows and micro-batches. UserError where it does not divide.

    `devices` is how many take rows of their own. A `device_batch_size` of 0 leaves it to `fit`, which says how many of
    a device's rows it can take at once.
    """
    rows, rest = divmod(total_batch_size, seq_len * devices)
    if rest or rows < 1:
        near = max(1, round(total_batch_size / (seq_len * devices))) * seq_len * devices
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of {seq_len} tokens x {devices} devices: "
            f"try {near}"
        )
    if device_batch_size == 0:
        device_batch_size = fit(rows)
    if device_batch_size < 1 or rows % device_batch_size:
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {rows} rows a device "
            f"(--total_batch_size={total_batch_size} / {seq_len} tokens / {devices} devices): "
            f"try {math.gcd(rows, max(1, device_batch_size))}"
        )
    return Geometry(rows // device_batch_size, device_batch_size, devices, seq_len)


def geometry_of_rows(
    total_rows: int, device_batch_size: int, seq_len: int, devices: int, fit: Callable[[int], int]
) -> Geometry:
    """Cuts as many rows over any number of devices: what does not divide is made up with padding.

    `device_batch_size` and `fit` as in `geometry`, but that of a step with fewer rows a device takes those at once.
    """
    if device_batch_size < 0:
        raise UserError(f"--device_batch_size={device_batch_size}: must be at least 1, or auto")
    share = -(-total_rows // devices)
    rows = min(device_batch_size, share) or fit(share)
    micro = -(-share // rows)
    return Geometry(micro, rows, devices, seq_len, padding=micro * rows * devices - total_rows)


def rows_of_examples(examples: int, mean_length: float, seq_len: int) -> int:
    """The rows that hold `examples` conversations of `mean_length` tokens: no matter how many devices there are, since
    another step is another recipe."""
    if examples < 1:
        raise UserError(f"--target_examples_per_step={examples}: must be at least 1")
    return math.ceil(examples * mean_length / seq_len)


# -----------------------------------------------------------------------------
# What fits


def rows_that_fit(model: GPTConfig, rows: int, need: Callable[[int, int], int], limit: int | None = None) -> int:
    """How many of a device's `rows` it can take at once: the most that divide them and whose step needs no more than
    `limit` bytes (default: the device's memory). On a CPU as many as make 8,192 tokens; more gain nothing.

    `need` says how many bytes a step of so many micro-batches of so many rows holds.
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if limit is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
            return max(n for n in divisors if n <= max(1, 8192 // model.sequence_len))
        limit = processes.least(int(0.95 * stats["bytes_limit"]) // MIB) * MIB
    # To know what a step needs means to compile it. Twice what is likely to fit is the first to be tried.
    likely = 1
    while 2 * likely <= rows and estimated_memory(model, 2 * likely) <= limit:
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
        f"one row of {model.sequence_len} tokens needs {used[1] / 2**30:.1f} GiB, the device has {limit / 2**30:.1f}: "
        "try --remat=full or --shard=full, or a smaller --max_seq_len"
    )


def estimated_memory(model: GPTConfig, rows: int) -> int:
    """Bytes, without compiling: weights, gradients and optimizer state, a chunk of logits, and about 17 activations of
    the width a layer and token, in two bytes each."""
    activations = 2 * 17 * model.n_layer * model.n_embd * model.sequence_len * rows
    return 16 * model.num_params + 12 * 8192 * model.padded_vocab + activations
