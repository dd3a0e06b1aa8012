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

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import sampler
from nanochat_jax.model import gpt
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

MAX_STOP_IDS = 8
SCORED = 128  # positions whose logits are in memory at once while a prompt is scored


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
def lay_out(params: gpt.Params) -> gpt.Params:
    """The weights as decoding reads them fastest: one array a layer instead of a stack, so that a loop need not copy
    each layer out of it in every step, and the head as [d,v], which spares a lone row on a CPU a fifth of its time."""
    blocks = {name: list(jnp.unstack(w)) for name, w in params["blocks"].items()}
    return {"wte": params["wte"], "head": params["lm_head"].T, "blocks": blocks}


def _stack(params: gpt.Params) -> gpt.Params:
    """What the model expects, for hidden states. Under jit this costs nothing: XLA takes slices of a concatenation from
    its operands, and nobody asks for the head."""
    blocks = {name: jnp.stack(layers) for name, layers in params["blocks"].items()}
    return {"wte": params["wte"], "lm_head": params["head"].T, "blocks": blocks}


def _head(params: gpt.Params, model_cfg: GPTConfig, x: jax.Array) -> jax.Array:
    """`gpt.head` with the weights as they are laid out here."""
    return gpt.soft_capped(
        jnp.einsum("...d,dv->...v", x, params["head"], preferred_element_type=accum_dtype(x.dtype)), model_cfg
    )


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype", "top"))
def prefill(params, ids, length, *, model_cfg: GPTConfig, dtype, top: int | None = None):
    """Prompts [p,t] of `length` [p] tokens, padded on the right -> their cache rows, next-token logits [p,v], scores.

    With `top`, scores are the log-probabilities [p,t] of each token's follower, and after each token the `top`
    likeliest ones and theirs [p,t,top]; otherwise None.
    """
    rows, size = ids.shape
    empty = kv.make(model_cfg, rows, size, dtype) | {"length": jnp.zeros(rows, jnp.int32)}
    x, prefix, logits = _append(params, ids, length, empty, model_cfg, dtype)
    if top is None:
        return prefix, logits, None

    def score(inputs):
        x, following = inputs
        logits = _head(params, model_cfg, x)
        return sampler.log_prob(logits, following), *sampler.top_logprobs(logits, top)

    # By position: the logits of a whole prompt at once would take more memory than the model.
    by_position = jnp.swapaxes(x, 0, 1), jnp.roll(ids, -1, axis=1).T
    scores = jax.lax.map(score, by_position, batch_size=max(1, SCORED // rows))
    return prefix, logits, jax.tree.map(lambda scored: jnp.swapaxes(scored, 0, 1), scores)


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"), donate_argnames="prefix")
def extend(params, ids, length, prefix, start, *, model_cfg: GPTConfig, dtype):
    """A piece of long prompts: `length` [p] of ids [p,t], padded on the right, go to position `start` [p] of the cache
    rows `prefix` -> the rows, next-token logits [p,v]. The caller keeps start + t within the rows."""
    _, prefix, logits = _append(params, ids, length, prefix | {"length": start}, model_cfg, dtype)
    return prefix, logits


def _append(params, ids, length, cache, model_cfg: GPTConfig, dtype):
    """ids [p,t], of which `length` [p] count, behind those in `cache` -> hidden states [p,t,d], rows, logits [p,v]."""
    x, cache = gpt.decode(_stack(params), model_cfg, ids, cache, dtype)
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)[:, 0]
    return x, {"k": cache["k"], "v": cache["v"]}, _head(params, model_cfg, last)


@functools.partial(jax.jit, static_argnames=("plan", "top", "mesh"))
def first(logits, row, settings, position, *, plan: sampler.Plan, top: int, mesh):
    """First tokens [b] and their log-probabilities: slot i draws its own from row[i] of the prefill's logits [p,v].
    Then the `top` likeliest tokens [b,top] and theirs."""

    def draw(logits, row, settings, position):
        logits = logits[row]
        token = sampler.sample(logits, settings, position, plan)
        return token, sampler.log_prob(logits, token), *sampler.top_logprobs(logits, top)

    return sharding.replicate(sharding.shard_map_rows(draw, mesh)(logits, row, settings, position), mesh)


@functools.partial(
    jax.jit, static_argnames=("model_cfg", "dtype", "python_end", "plan", "top", "mesh"), donate_argnames="cache"
)
def decode(
    params,
    cache,
    schedule,
    settings,
    *,
    model_cfg: GPTConfig,
    dtype,
    python_end: int,
    plan: sampler.Plan,
    top: int,
    mesh,
):
    """A chunk of decoding -> (cache, (tokens [b,steps], log-probabilities [b,steps], how many of them count [b],
    the `top` likeliest tokens [b,steps,top] of each step, their log-probabilities)).

    A row that is not active repeats its last step without growing, which leaves its cache as it is.
    """

    def chunk(params, cache, schedule, settings):
        def step(carry, inputs):
            cache, token, length, left, active = carry
            i, forced = inputs
            x, new = gpt.decode(_stack(params), model_cfg, token[:, None], cache | {"length": length}, dtype)
            logits = _head(params, model_cfg, x[:, 0])
            sampled = sampler.sample(logits, settings, length + 1, plan)
            token = jnp.where(active, jnp.where(i < schedule.forced_count, forced, sampled), token)
            emitted = (token, sampler.log_prob(logits, token), active, *sampler.top_logprobs(logits, top))
            length, left = length + active, left - active
            ends = (token[:, None] == schedule.stop).any(-1) | (left <= 0)
            pauses = schedule.tools & (token == python_end)
            active = active & ~ends & ~pauses
            return ({"k": new["k"], "v": new["v"]}, token, length, left, active), emitted

        carry = (cache, schedule.token, schedule.length, schedule.left, schedule.active)
        inputs = (jnp.arange(schedule.forced.shape[1]), schedule.forced.T)
        (cache, *_), (tokens, logprobs, counts, *top_logprobs) = jax.lax.scan(step, carry, inputs)
        return cache, (tokens.T, logprobs.T, counts.sum(0), *(jnp.swapaxes(x, 0, 1) for x in top_logprobs))

    cache, out = sharding.shard_map_rows(chunk, mesh)(params, cache, schedule, settings)
    return cache, sharding.replicate(out, mesh)
