"""Samples follow the expected distribution, and what a row draws depends only on that row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.engine import sampler
from nanochat_jax.engine.sampler import Plan, Settings

VOCAB = 300
ROWS = 2000  # in every test, since each new shape is compiled


def settings(temperature=1.0, top_k=0, top_p=1.0, seed=None) -> Settings:
    """The same settings for every row, except for the seeds."""
    seeds = np.arange(ROWS, dtype=np.uint32) if seed is None else np.full(ROWS, seed, np.uint32)
    full = functools.partial(np.full, ROWS)
    return Settings(seeds, full(0, np.int32), full(temperature, np.float32), full(top_k, np.int32),
                    full(top_p, np.float32))  # fmt: skip


@pytest.fixture(scope="module")
def logits():
    return np.asarray(jax.random.normal(jax.random.key(0), (VOCAB,)) * 2)


def draw(logits, chosen: Settings, position=7) -> np.ndarray:
    logits = jnp.broadcast_to(logits, (ROWS, logits.shape[-1]))
    plan = sampler.plan(chosen, logits.shape[-1])
    positions = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (ROWS,))
    return np.asarray(jax.jit(sampler.sample, static_argnums=3)(logits, chosen, positions, plan))


@pytest.mark.parametrize("chosen", [
    dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.6), dict(temperature=1.5, top_k=20, top_p=0.8),
])  # fmt: skip
def test_frequencies_are_those_of_the_filtered_softmax(logits, chosen):
    temperature, top_k, top_p = (chosen.get(k, d) for k, d in [("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)])
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    drawn = draw(logits, settings(**chosen))
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    # Chi-square over the tokens expected at least five times; six standard deviations above its mean is a bug.
    expected = p * ROWS
    common = expected >= 5
    chi = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi < common.sum() + 6 * np.sqrt(2 * common.sum())


def test_greedy_takes_the_first_of_the_largest_and_some_token_of_no_numbers():
    tied = np.zeros(VOCAB, np.float32)
    tied[[40, 41, 200]] = 3
    assert set(draw(tied, settings(temperature=0))) == {40}
    assert set(draw(np.full(VOCAB, np.nan, np.float32), settings(temperature=0))) <= set(range(VOCAB))


def test_zero_switches_off(logits):
    best = int(np.argmax(logits))
    assert (draw(logits, settings(temperature=0)) == best).all()
    assert (draw(logits, settings(temperature=0, top_k=5, top_p=0.5)) == best).all()
    assert (draw(logits, settings(temperature=1e-30)) == best).all()
    assert (draw(logits, settings(top_k=1)) == best).all()
    assert (draw(logits, settings(top_p=1e-9)) == best).all()
    assert len(set(draw(logits, settings(top_k=0)))) > 20


def test_top_k_beyond_the_vocabulary_is_the_vocabulary(logits):
    drawn = draw(logits[:10], settings(temperature=3.0, top_k=1000))
    assert set(drawn) == set(range(10))


def test_a_row_draws_the_same_whatever_the_others_want(logits):
    """Alone, each kind of row gets the cheapest plan; together, they get the widest."""
    kinds = [settings(temperature=0), settings(), settings(top_k=3), settings(top_k=200), settings(top_p=0.7)]
    assert {sampler.plan(kind, VOCAB) for kind in kinds} == {
        Plan(0, False), Plan(0, True), Plan(64, False), Plan(256, False), Plan(VOCAB, False),
    }  # fmt: skip
    alone = np.stack([draw(logits, kind) for kind in kinds])
    which = np.arange(ROWS) % len(kinds)
    crowd = Settings(*(np.stack(column)[which, np.arange(ROWS)] for column in zip(*kinds, strict=True)))
    assert sampler.plan(crowd, VOCAB) == Plan(VOCAB, True)
    np.testing.assert_array_equal(draw(logits, crowd), alone[which, np.arange(ROWS)])


def test_noise_differs_by_seed_sample_and_position(logits):
    one = settings(seed=1)
    assert len(set(draw(logits, one))) == 1
    assert len(set(draw(logits, one._replace(sample=np.arange(ROWS, dtype=np.int32))))) > 20
    assert len(set(draw(logits, one, position=np.arange(ROWS)))) > 20
    assert len(set(draw(logits, settings()))) > 20


def test_log_prob_is_that_of_the_full_softmax(logits):
    token = jnp.arange(VOCAB)
    got = sampler.log_prob(jnp.broadcast_to(logits, (VOCAB, VOCAB)), token)
    np.testing.assert_allclose(got, jax.nn.log_softmax(jnp.asarray(logits)), atol=1e-5)


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("vocab", [4096, 5000])
def test_the_largest_logits_are_those_of_top_k(monkeypatch, k, vocab):
    """Equal numbers included: of these, the first come first."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cuda, default: cuda(x))
    logits = jnp.round(4 * jax.random.normal(jax.random.key(0), (3, vocab))).at[2].set(-jnp.inf)
    for ours, expected in zip(sampler.top_k(logits, k), jax.lax.top_k(logits, k), strict=True):
        np.testing.assert_array_equal(ours, expected)
