"""What the engine does on the device: prefill prompts, draw first tokens, decode a chunk for all slots.

Slots have nothing to say to each other, so with several devices each computes its own share of them, by shard_map:
left to itself the compiler would gather all logits on every device for top-k, in every step. Prompts are prefilled on
every device: that costs little beside decoding, and a group of samples shares one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import gpt, sharding
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import sampler

MAX_STOP_IDS = 8


class Schedule(NamedTuple):
    """What the host tells the device about the slots for one chunk; arrays [b] unless noted."""

    token: np.ndarray  # the last token of the row, not in the cache yet
    length: np.ndarray  # tokens before it, all in the cache
    left: np.ndarray  # tokens the row may still get
    active: np.ndarray
    tools: np.ndarray  # whether python_end pauses the row
    stop: np.ndarray  # [b, MAX_STOP_IDS], padded with -1
    forced: np.ndarray  # [b, steps] tokens to take instead of sampled ones
    forced_count: np.ndarray  # how many of them each row has


@jax.jit
def unstack(params: gpt.Params) -> gpt.Params:
    """One array a layer instead of a stack, so that a loop need not copy each layer out of it in every step."""
    return params | {"blocks": {name: list(jnp.unstack(w)) for name, w in params["blocks"].items()}}


def _stack(params: gpt.Params) -> gpt.Params:
    """What the model expects. Under jit this costs nothing: XLA takes slices of a concatenation from its operands."""
    return params | {"blocks": {name: jnp.stack(layers) for name, layers in params["blocks"].items()}}


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def prefill(params, ids, length, *, cfg: GPTConfig, dtype):
    """Prompts [p,t] of `length` [p] tokens, padded on the right -> their cache rows and next-token logits [p,v]."""
    rows, size = ids.shape
    empty = kv.make(cfg, rows, size, dtype) | {"length": jnp.zeros(rows, jnp.int32)}
    x, cache = gpt.decode(_stack(params), cfg, ids, empty, dtype)
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)[:, 0]
    return {"k": cache["k"], "v": cache["v"]}, gpt.head(params, cfg, last)


@functools.partial(jax.jit, static_argnames=("plan", "mesh"))
def first(logits, row, settings, position, *, plan: sampler.Plan, mesh):
    """First tokens [b] and their log-probabilities: slot i draws its own from row[i] of the prefill's logits [p,v]."""

    def draw(logits, row, settings, position):
        logits = logits[row]
        token = sampler.sample(logits, settings, position, plan)
        return token, sampler.log_prob(logits, token)

    return sharding.everywhere(sharding.by_rows(draw, mesh)(logits, row, settings, position), mesh)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "python_end", "plan", "mesh"), donate_argnames="cache")
def decode(params, cache, schedule, settings, *, cfg: GPTConfig, dtype, python_end: int, plan: sampler.Plan, mesh):
    """A chunk of decoding -> (cache, (tokens [b,steps], log-probabilities [b,steps], how many of them count [b])).

    A row that is not active repeats its last step without growing, which leaves its cache as it is.
    """

    def chunk(params, cache, schedule, settings):
        def step(carry, inputs):
            cache, token, length, left, active = carry
            i, forced = inputs
            x, new = gpt.decode(_stack(params), cfg, token[:, None], cache | {"length": length}, dtype)
            logits = gpt.head(params, cfg, x[:, 0])
            sampled = sampler.sample(logits, settings, length + 1, plan)
            token = jnp.where(active, jnp.where(i < schedule.forced_count, forced, sampled), token)
            emitted = (token, sampler.log_prob(logits, token), active)
            length, left = length + active, left - active
            ends = (token[:, None] == schedule.stop).any(-1) | (left <= 0)
            pauses = schedule.tools & (token == python_end)
            active = active & ~ends & ~pauses
            return ({"k": new["k"], "v": new["v"]}, token, length, left, active), emitted

        carry = (cache, schedule.token, schedule.length, schedule.left, schedule.active)
        inputs = (jnp.arange(schedule.forced.shape[1]), schedule.forced.T)
        (cache, *_), (tokens, logprobs, counts) = jax.lax.scan(step, carry, inputs)
        return cache, (tokens.T, logprobs.T, counts.sum(0))

    cache, out = sharding.by_rows(chunk, mesh)(params, cache, schedule, settings)
    return cache, sharding.everywhere(out, mesh)
