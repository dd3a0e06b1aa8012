"""The engine's compiled functions. They prefill prompts, draw first tokens, and decode a chunk of tokens for all slots.

Slots are independent, so each replica decodes its own share of the slots under shard_map. Without shard_map, the
compiler would gather all logits on every device in every step, in order to compute top-k.

Prefill is not divided among the replicas: every device prefills all prompts. In RL this costs little compared with
decoding, because all samples of a prompt share one prefill. In evaluation, a prompt has one sample, so it costs more.
But with one engine per device, every program would be compiled once per device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import sampler
from nanochat_jax.engine.sampler import Array
from nanochat_jax.model import gpt
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

SCORED = 128  # prompts are scored in pieces of this many positions, to save memory


def min_slots() -> int:
    """Returns how many slots decoding has at least.

    On GPUs, it has two. With one row, XLA would turn every product of a vector and a matrix into a multiplication and a
    sum, and would write what it multiplied to memory as float32. So a token of one answer would read and write 1.9 GiB
    instead of 1.0 (d20, JAX 0.10.2), in 451 kernels instead of 325.
    """
    return 2 if jax.default_backend() == "gpu" else 1


DecodeParams = dict  # nested dict of arrays, as `lay_out` returns it


# -----------------------------------------------------------------------------
# Inputs and results of the compiled functions


class Fixed(NamedTuple):
    """Static arguments of the compiled functions. They stay the same for the life of an engine."""

    model_cfg: GPTConfig
    dtype: DTypeLike  # the dtype of the matmuls
    python_end: int  # the token that ends a tool call and pauses the row
    mesh: Mesh | None  # divides the slots among the replicas; if None, every device decodes all slots


class DecodeInputs(NamedTuple):
    """The state of all slots at the start of a chunk. The arrays have the shape [b] unless stated otherwise."""

    token: Array  # the row's last token, which is not in the cache yet
    length: Array  # the number of tokens before `token`; the cache holds all of them
    left: Array  # how many more tokens may be added to the row
    active: Array  # whether the row gets new tokens
    tools: Array  # whether python_end pauses the row
    stop: Array  # [b, MAX_STOP_IDS] ids of the row's stop tokens, padded with -1
    forced: Array  # [b, steps] the tokens that the row gets before sampling continues
    forced_count: Array  # the number of valid tokens in each row of `forced`


class DecodeState(NamedTuple):
    """The fields of DecodeInputs that decoding changes, at the end of a chunk. The arrays have the shape [b]."""

    token: Array
    length: Array
    left: Array
    active: Array


class Tokens(NamedTuple):
    """New tokens of all slots, on the host. In row i, only the first `counts[i]` steps are valid."""

    ids: np.ndarray  # [b, steps]
    logprobs: np.ndarray  # [b, steps]
    counts: np.ndarray  # [b]
    top_ids: np.ndarray  # [b, steps, top] the most likely tokens at each step
    top_logprobs: np.ndarray  # [b, steps, top]


class PromptScores(NamedTuple):
    """The scores of p prompts at t positions, padding included."""

    logprobs: Array  # [p, t] log-probability of the token after each position
    top_ids: Array  # [p, t, top] the most likely tokens after each position
    top_logprobs: Array  # [p, t, top]


# -----------------------------------------------------------------------------
# Compiled functions


@jax.jit
def lay_out(params: gpt.Params) -> DecodeParams:
    """Returns the weights in the layout that decoding reads fastest.

    Each weight has one array per layer. If one array held all layers, the decoding loop would copy every layer out of
    it in every step. The head is stored as [d,v]. On a CPU, this saves a fifth of the time that it takes to decode one
    row.
    """
    blocks = {name: list(jnp.unstack(w)) for name, w in params["blocks"].items()}
    return {"wte": params["wte"], "head": params["lm_head"].T, "blocks": blocks}


def _stack(params: DecodeParams) -> gpt.Params:
    """Returns the weights in the layout that the model expects.

    Under jit this costs nothing, because XLA reads each layer from its own array and never builds the stack. XLA also
    drops the transposed head, because `gpt.decode` does not use it.
    """
    blocks = {name: jnp.stack(layers) for name, layers in params["blocks"].items()}
    return {"wte": params["wte"], "lm_head": params["head"].T, "blocks": blocks}


def _head(params: DecodeParams, model_cfg: GPTConfig, x: jax.Array) -> jax.Array:
    """Does the same as `gpt.head`, with the weights that `lay_out` returns: x [...,d] -> logits [...,v]."""
    return gpt.soft_capped(
        jnp.einsum("...d,dv->...v", x, params["head"], preferred_element_type=accum_dtype(x.dtype)), model_cfg
    )


def _append(
    params: DecodeParams, ids: jax.Array, length: jax.Array, cache: dict, model_cfg: GPTConfig, dtype: DTypeLike
) -> tuple[jax.Array, kv.KV, jax.Array]:
    """Appends ids [p,t] to the rows of `cache`. `length` [p] is the number of valid ids in each row.

    Returns (hidden states [p,t,d], the extended rows, logits [p,v] after each row's last valid id).
    """
    x, cache = gpt.decode(_stack(params), model_cfg, ids, cache, dtype)
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)[:, 0]
    return x, {"k": cache["k"], "v": cache["v"]}, _head(params, model_cfg, last)


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype", "top"))
def prefill(
    params: DecodeParams,
    ids: jax.Array,
    length: jax.Array,
    *,
    model_cfg: GPTConfig,
    dtype: DTypeLike,
    top: int | None = None,
) -> tuple[kv.KV, jax.Array, PromptScores | None]:
    """Prefills prompts, and returns (the prompts' cache rows, next-token logits [p,v], the prompts' scores).

    The prompts are `ids` [p,t], padded on the right. `length` [p] is the number of tokens in each prompt. If `top` is
    None, the scores are None. Otherwise, the scores include the `top` most likely tokens at each position.
    """
    rows, size = ids.shape
    empty = kv.allocate(model_cfg, rows, size, dtype) | {"length": jnp.zeros(rows, jnp.int32)}
    x, prefix, logits = _append(params, ids, length, empty, model_cfg, dtype)
    if top is None:
        return prefix, logits, None

    def score(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x, following = inputs
        logits = _head(params, model_cfg, x)
        return sampler.log_prob(logits, following), *sampler.top_logprobs(logits, top)

    # Only a few positions are scored at a time, because the logits of whole prompts would need more memory than the
    # model.
    by_position = jnp.swapaxes(x, 0, 1), jnp.roll(ids, -1, axis=1).T
    scores = jax.lax.map(score, by_position, batch_size=max(1, SCORED // rows))
    return prefix, logits, PromptScores(*(jnp.swapaxes(scored, 0, 1) for scored in scores))


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"), donate_argnames="prefix")
def prefill_chunk(
    params: DecodeParams,
    ids: jax.Array,
    length: jax.Array,
    prefix: kv.KV,
    start: jax.Array,
    *,
    model_cfg: GPTConfig,
    dtype: DTypeLike,
) -> tuple[kv.KV, jax.Array]:
    """Appends chunks of long prompts to the cache rows in `prefix`. Returns (the rows, next-token logits [p,v]).

    The chunks are `ids` [p,t], padded on the right. `length` [p] is the number of tokens in each chunk. `start` [p] is
    the position of each chunk's first token. The caller must ensure that start + t is at most the row's size.
    """
    _, prefix, logits = _append(params, ids, length, prefix | {"length": start}, model_cfg, dtype)
    return prefix, logits


@functools.partial(jax.jit, static_argnames=("plan", "top", "mesh"))
def first_tokens(
    logits: jax.Array,
    row: jax.Array,
    settings: sampler.Settings,
    position: jax.Array,
    *,
    plan: sampler.Plan,
    top: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, ...]:
    """For each slot i, draws the first token from logits[row[i]]. The prefill has computed `logits` [p,v].

    Returns (tokens [b], their log-probabilities [b], the `top` most likely tokens [b,top], their log-probabilities
    [b,top]).
    """

    def draw(
        logits: jax.Array, row: jax.Array, settings: sampler.Settings, position: jax.Array
    ) -> tuple[jax.Array, ...]:
        logits = logits[row]
        token = sampler.sample(logits, settings, position, plan)
        return token, sampler.log_prob(logits, token), *sampler.top_logprobs(logits, top)

    return sharding.replicate(sharding.shard_map_rows(draw, mesh)(logits, row, settings, position), mesh)


@functools.partial(jax.jit, static_argnames=("fixed", "plan", "top"), donate_argnames="cache")
def decode(
    params: DecodeParams,
    cache: kv.KV,
    slots: DecodeInputs,
    settings: sampler.Settings,
    *,
    fixed: Fixed,
    plan: sampler.Plan,
    top: int,
) -> tuple[kv.KV, DecodeState, tuple[jax.Array, ...]]:
    """Decodes a chunk for all slots.

    Returns (the cache, the state after the chunk, the fields of Tokens). In an inactive row, every step decodes the
    row's last token again at the same position. So the cached keys and values of its earlier tokens do not change.
    """
    model_cfg, dtype, python_end, mesh = fixed

    def chunk(
        params: DecodeParams, cache: kv.KV, slots: DecodeInputs, settings: sampler.Settings
    ) -> tuple[kv.KV, DecodeState, tuple[jax.Array, ...]]:
        def step(carry: tuple, inputs: tuple[jax.Array, Array]) -> tuple[tuple, tuple]:
            cache, token, length, left, active = carry
            i, forced = inputs
            x, new = gpt.decode(_stack(params), model_cfg, token[:, None], cache | {"length": length}, dtype)
            logits = _head(params, model_cfg, x[:, 0])
            sampled = sampler.sample(logits, settings, length + 1, plan)
            token = jnp.where(active, jnp.where(i < slots.forced_count, forced, sampled), token)
            emitted = (token, sampler.log_prob(logits, token), active, *sampler.top_logprobs(logits, top))
            length, left = length + active, left - active
            ends = (token[:, None] == slots.stop).any(-1) | (left <= 0)
            pauses = slots.tools & (token == python_end)
            active = active & ~ends & ~pauses
            return ({"k": new["k"], "v": new["v"]}, token, length, left, active), emitted

        carry: tuple = (cache, slots.token, slots.length, slots.left, slots.active)
        inputs = (jnp.arange(slots.forced.shape[1]), slots.forced.T)
        (cache, *state), (tokens, logprobs, counts, *top_logprobs) = jax.lax.scan(step, carry, inputs)
        return (
            cache,
            DecodeState(*state),
            (tokens.T, logprobs.T, counts.sum(0), *(jnp.swapaxes(x, 0, 1) for x in top_logprobs)),
        )

    cache, state, out = sharding.shard_map_rows(chunk, mesh)(params, cache, slots, settings)
    return cache, *sharding.replicate((state, out), mesh)
