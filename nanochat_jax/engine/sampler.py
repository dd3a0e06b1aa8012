"""Samples the next token of each row, on the device. Each row has its own sampling settings.

To sample a token, the sampler adds Gumbel noise to the logits and takes the token with the largest sum. The noise
depends only on the row's seed, its sample number and the token's position. So a request gives the same text whether it
runs alone or with other requests. A row that uses neither top-k nor top-p needs noise for the whole vocabulary. A row
that uses top-k or top-p needs noise only for its most likely tokens, which saves time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.engine.request import Request

WIDTHS = (64, 256)  # numbers of top tokens to rank; the smallest that suffices is used, or the whole vocabulary
GROUP = 64  # neighbouring logits that are compared by their maximum first
COLDEST = 1e-5  # lower temperatures are raised to this value, because dividing by a lower temperature could overflow


Array = jax.Array | np.ndarray  # a numpy array on the host, a traced array within jit


class Settings(NamedTuple):
    """The sampling settings of all rows. Each field is an array [b]."""

    seed: Array  # uint32
    sample: Array  # int32, index of the row's sample within the request
    temperature: Array  # float32, 0: greedy
    top_k: Array  # int32, 0: off
    top_p: Array  # float32, 1: off


class Plan(NamedTuple):
    """A static argument that says which operations are compiled into the sampler.

    A plan may include operations that a row does not need. These operations do not change the row's token.
    """

    width: int  # how many of the most likely tokens to rank; 0 if no row uses top-k or top-p
    noise: bool  # whether any row samples from the whole vocabulary


def settings(rows: Sequence[tuple[Request, int] | None], vocab_size: int) -> Settings:
    """Returns the settings of rows, as numpy arrays. A row is (its request, the index of its sample) or None.

    Rows that are None get greedy settings, because greedy sampling adds no operations to the plan.
    """
    requests = [row[0] if row else None for row in rows]
    return Settings(
        seed=np.array([r.seed % 2**32 if r else 0 for r in requests], np.uint32),
        sample=np.array([row[1] if row else 0 for row in rows], np.int32),
        temperature=np.array([r.temperature if r else 0 for r in requests], np.float32),
        top_k=np.array([min(r.top_k, vocab_size) if r else 0 for r in requests], np.int32),
        top_p=np.array([r.top_p if r else 1 for r in requests], np.float32),
    )


def plan(settings: Settings, vocab_size: int) -> Plan:
    """Returns the cheapest plan for `settings`, which must hold numpy arrays.

    There are only a few different plans, because each plan needs its own compiled program.
    """
    warm = settings.temperature > 0
    by_k, by_p = warm & (settings.top_k > 0), warm & (settings.top_p < 1)
    widest = int(np.max(settings.top_k, where=by_k, initial=0))
    if np.any(by_p & ~by_k):
        widest = vocab_size  # top-p may keep any number of tokens
    width = next((w for w in (0, *WIDTHS) if widest <= w), vocab_size)
    return Plan(min(width, vocab_size), bool(np.any(warm & ~by_k & ~by_p)))


def sample(logits: jax.Array, settings: Settings, position: jax.Array, plan: Plan) -> jax.Array:
    """Samples a token from each row: logits float32 [b,v] -> token ids int32 [b].

    `position` [b] holds the positions of the new tokens. Temperature is applied first, then top-k. Top-p is applied
    last, to the renormalised probabilities. The transformers library uses the same order.
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
    """Returns the index of the largest entry in each row: x [b,v] -> int32 [b]. If entries are equal, the first wins.

    On a CPU, this is four times as fast as `jnp.argmax`. XLA:CPU vectorises the two simple reductions used here, but
    not the reduction over (value, index) pairs that `jnp.argmax` uses.
    """
    last = x.shape[-1] - 1  # the result for a row that contains a NaN
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x == x.max(-1, keepdims=True), places, last).min(-1)


def _sample_ranked(scaled: jax.Array, settings: Settings, keys: jax.Array, width: int) -> jax.Array:
    """Filters each row's `width` most likely tokens by top-k and top-p, and samples one of those that remain."""
    scores, ids = top_k(scaled, width)
    off = (settings.top_k <= 0)[:, None]
    scores = jnp.where(off | (jnp.arange(width)[None] < settings.top_k[:, None]), scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1)
    # For each token, `before` is the total probability of all more likely tokens. It is 0 for the most likely token, so
    # that token is always kept.
    before = jnp.cumsum(p, axis=-1) - p
    top_p = settings.top_p[:, None]
    scores = jnp.where((top_p >= 1) | (before < top_p), scores, -jnp.inf)
    rank = jnp.argmax(scores + _gumbel(keys, width), axis=-1)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest numbers in each row of x [b,v], in descending order, and their indices: both [b,k].

    The result is that of `jax.lax.top_k`: of equal numbers, the one with the lower index comes first. On a GPU, XLA
    sorts the whole row for `jax.lax.top_k`, so this function sorts only what may be among the largest.
    """

    def whole_row(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.lax.top_k(x, k))

    if 2 * k * GROUP >= x.shape[-1]:
        return whole_row(x)
    return jax.lax.platform_dependent(x, cuda=lambda x: _top_k_of_groups(x, k), default=whole_row)


def _top_k_of_groups(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Does the same as `top_k`. Looks only into the k groups of GROUP neighbours that have the largest maxima.

    No other group can hold one of the k largest numbers: its maximum comes after the maxima of k groups.
    """
    b, v = x.shape
    groups = jnp.pad(x, ((0, 0), (0, -v % GROUP)), constant_values=-jnp.inf).reshape(b, -1, GROUP)
    _, best = jax.lax.top_k(groups.max(-1), k)
    best = jnp.sort(best, axis=-1)  # in the order of the row, so that of equal numbers the first still comes first
    candidates = jnp.take_along_axis(groups, best[..., None], axis=1).reshape(b, -1)
    largest, place = jax.lax.top_k(candidates, k)
    return largest, jnp.take_along_axis(best, place // GROUP, axis=-1) * GROUP + place % GROUP


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the log-probability of `token` [b] under the softmax of `logits` [b,v].

    Temperature, top-k and top-p are not applied.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `top` most likely tokens [b,top] for `logits` [b,v], and their log-probabilities [b,top]."""
    if not top:
        return jnp.zeros((len(logits), 0), jnp.int32), jnp.zeros((len(logits), 0), logits.dtype)
    scores, ids = top_k(logits, top)
    return ids, scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _key(seed: Array, sample: Array, position: Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)


def _gumbel(keys: jax.Array, width: int) -> jax.Array:
    """Returns noise [b,width]. The generator is counter-based, so a narrow draw equals the beginning of a wide draw."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (width,)))(keys)
