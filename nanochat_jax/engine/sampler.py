"""Samples the next token of every row on the device, each row with its own settings.

A row's noise depends only on its seed, its sample number and the position of the token, so a request gives the same
text whether it runs alone or with others. Rows without top-k and top-p draw Gumbel noise for every token id of the
vocabulary. Rows with top-k or top-p draw noise only for the most likely tokens, one value for each rank, which saves
work.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTHS = (64, 256)  # how many candidates top-k may rank; for a larger k, the whole vocabulary is ranked
COLDEST = 1e-5  # the lowest temperature to divide by; below it, a float32 softmax is an argmax, and division overflows


Array = jax.Array | np.ndarray  # a numpy array on the host, a traced array within jit


class Settings(NamedTuple):
    """The sampling settings of each row; arrays [b]."""

    seed: Array  # uint32
    sample: Array  # int32, which of the request's samples
    temperature: Array  # float32, 0: greedy
    top_k: Array  # int32, 0: off
    top_p: Array  # float32, 1: off


class Plan(NamedTuple):
    """What the compiled sampler must support; a static argument. A plan decides which operations run, but it does not
    change the token that a row draws."""

    width: int  # number of candidates to rank; 0: no row uses top-k or top-p
    noise: bool  # whether any row samples from the whole vocabulary


def plan(settings: Settings, vocab_size: int) -> Plan:
    """The cheapest plan for these settings (numpy arrays). Few plans exist, so that few programs are compiled."""
    warm = settings.temperature > 0
    by_k, by_p = warm & (settings.top_k > 0), warm & (settings.top_p < 1)
    widest = int(np.max(settings.top_k, where=by_k, initial=0))
    if np.any(by_p & ~by_k):
        widest = vocab_size  # top-p may keep any number of tokens
    width = next((w for w in (0, *WIDTHS) if widest <= w), vocab_size)
    return Plan(min(width, vocab_size), bool(np.any(warm & ~by_k & ~by_p)))


def sample(logits: jax.Array, settings: Settings, position: jax.Array, plan: Plan) -> jax.Array:
    """Samples a token from each row of logits float32 [b,v] -> int32 [b]; `position` [b] is the token's place.

    Temperature is applied first, then top-k, then top-p to the renormalised rest (the order in transformers).
    """
    token = _argmax(logits)
    if not (plan.width or plan.noise):
        return token
    keys = jax.vmap(_key)(settings.seed, settings.sample, position)
    scaled = logits / jnp.maximum(settings.temperature, COLDEST)[:, None]
    filtered = (settings.top_k > 0) | (settings.top_p < 1)
    warm = settings.temperature > 0
    if plan.noise:
        drawn = _argmax(scaled + _gumbel(keys, logits.shape[-1]))
        token = jnp.where(warm & ~filtered, drawn, token)
    if plan.width:
        drawn = _sample_ranked(scaled, settings, keys, plan.width)
        token = jnp.where(warm & filtered, drawn, token)
    return token


def _argmax(x: jax.Array) -> jax.Array:
    """The index int32 [b] of the largest entry of each row of x [b,v]; of equal entries, the first.

    It uses two plain reductions, which XLA:CPU vectorises. On a CPU, this is four times as fast as `jnp.argmax`, which
    is a single reduction over pairs of a value and an index.
    """
    last = x.shape[-1] - 1  # also the result for a row of NaN
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x == x.max(-1, keepdims=True), places, last).min(-1)


def _sample_ranked(scaled: jax.Array, settings: Settings, keys: jax.Array, width: int) -> jax.Array:
    """Samples a token for each row from its `width` most likely tokens, filtered by top-k and top-p."""
    scores, ids = jax.lax.top_k(scaled, width)
    off = (settings.top_k <= 0)[:, None]
    scores = jnp.where(off | (jnp.arange(width)[None] < settings.top_k[:, None]), scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1)
    # The total probability of all more likely tokens. It is 0 for the first token, which is therefore always kept.
    before = jnp.cumsum(p, axis=-1) - p
    top_p = settings.top_p[:, None]
    scores = jnp.where((top_p >= 1) | (before < top_p), scores, -jnp.inf)
    rank = jnp.argmax(scores + _gumbel(keys, width), axis=-1)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Log-probability of token [b] under the full softmax of logits [b,v] at temperature 1.

    How the token was chosen makes no difference.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """The `top` most likely tokens [b,top] of logits [b,v] and their log-probabilities; empty arrays if `top` is 0."""
    if not top:
        return jnp.zeros((len(logits), 0), jnp.int32), jnp.zeros((len(logits), 0), logits.dtype)
    scores, ids = jax.lax.top_k(logits, top)
    return ids, scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _key(seed: Array, sample: Array, position: Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)


def _gumbel(keys: jax.Array, width: int) -> jax.Array:
    """Noise [b,width]. A wider draw begins with the same entries as a narrower one, because the bits are
    counter-based."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (width,)))(keys)
