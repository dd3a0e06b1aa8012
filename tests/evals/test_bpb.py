"""Bits per byte against the plain formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import GPTConfig
from nanochat_jax.evals import bpb
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.model import gpt

CFG = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, vocab_size=100, sequence_len=32)


@pytest.fixture(scope="module")
def params():
    # The head is initialised almost to zero; a larger one makes losses differ from token to token.
    params = gpt.init(CFG, seed=1)
    return params | {"lm_head": params["lm_head"] * 1000}


def make_batches(count=3, b=4, t=24):
    rng = np.random.default_rng(0)
    return [
        {
            "inputs": rng.integers(0, 100, (b, t), dtype=np.int32),
            "targets": rng.integers(-1, 100, (b, t), dtype=np.int32),
        }
        for _ in range(count)
    ]


class Bytes:
    """A tokenizer whose tokens have the given numbers of bytes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def token_bytes(self):
        return self.sizes


def model_of(params, token_bytes) -> EvalModel:
    return EvalModel(params, CFG, Bytes(token_bytes))


def plain(params, batches, token_bytes) -> float:
    rows = plain_rows(params, batches, token_bytes)
    return sum(nats for nats, _ in rows) / math.log(2) / sum(size for _, size in rows)


def plain_rows(params, batches, token_bytes) -> list[tuple[float, float]]:
    """The nats and the bytes of each row."""
    rows = []
    log_probabilities = jax.jit(lambda p, ids: jax.nn.log_softmax(gpt.forward(p, CFG, ids)))
    for batch in batches:
        logp = np.asarray(log_probabilities(params, batch["inputs"]), np.float64)
        for row, targets in zip(logp, batch["targets"], strict=True):
            nats = size = 0.0
            for position, target in enumerate(targets):
                if target >= 0 and token_bytes[target] > 0:
                    nats -= row[position, target]
                    size += token_bytes[target]
            rows.append((nats, size))
    return rows


def test_equals_the_plain_formula(params):
    token_bytes = np.arange(100, dtype=np.int32) % 7  # every seventh token has no bytes
    batches = make_batches()
    expected = plain(params, batches, token_bytes)
    result = bits_per_byte(model_of(params, token_bytes), batches)
    assert result.bpb == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum((batch["targets"] >= 0).sum() for batch in batches) and result.rows == 12


def test_standard_error_is_the_spread_of_the_result_over_other_rows(params):
    """Against the bootstrap: bits per byte of rows drawn again with replacement. The sizes of the rows vary, too."""
    rng = np.random.default_rng(1)
    token_bytes = np.arange(100, dtype=np.int32) % 7
    batches = make_batches(10)
    for batch in batches:  # rows of different lengths, as in finetuning
        for row in batch["targets"]:
            row[rng.integers(4, 24) :] = -1
    rows = np.array(plain_rows(params, batches, token_bytes))
    drawn = rows[rng.integers(0, len(rows), (4000, len(rows)))].sum(axis=1)
    bootstrap = np.std(drawn[:, 0] / drawn[:, 1] / math.log(2))
    result = bits_per_byte(model_of(params, token_bytes), batches)
    assert result.stderr == pytest.approx(bootstrap, rel=0.08)  # either has an error of some percent
    assert str(result) == f"{result.bpb:.6f} ± {result.stderr:.6f} (n={result.tokens:,} tokens, 40 rows)"


def test_rows_of_padding_do_not_count(params):
    """The last batch of a text is filled up with empty rows. They make neither the error nor n better."""
    model, batches = model_of(params, np.arange(100, dtype=np.int32) % 5), make_batches()
    empty = {"inputs": np.zeros((50, 24), np.int32), "targets": np.full((50, 24), -1, np.int32)}
    assert bits_per_byte(model, [*batches, empty]) == pytest.approx(bits_per_byte(model, batches), rel=1e-9)
    one = {name: array[:1] for name, array in batches[0].items()}
    alone = bits_per_byte(model, [one, empty])
    assert alone.rows == 1 and alone.stderr is None and "±" not in str(alone)


def test_rows_may_be_batched_in_any_way(params):
    token_bytes = np.arange(100, dtype=np.int32) % 5
    one = {k: np.concatenate([b[k] for b in make_batches()]) for k in ("inputs", "targets")}
    model = model_of(params, token_bytes)
    assert bits_per_byte(model, [one]) == pytest.approx(bits_per_byte(model, make_batches()), rel=1e-5)


def test_bytes_are_those_given_and_not_of_decoded_text(params):
    """A token that is half a character counts by its raw bytes. Twice the bytes give half the bits per byte."""
    batches = make_batches()
    once = bits_per_byte(model_of(params, np.ones(100, np.int32)), batches).bpb
    twice = bits_per_byte(model_of(params, np.full(100, 2, np.int32)), batches).bpb
    assert twice == pytest.approx(once / 2, rel=1e-6)


def test_no_bytes_is_infinite(params):
    empty = [{"inputs": np.zeros((2, 8), np.int32), "targets": np.full((2, 8), -1, np.int32)}]
    ones, zeros = model_of(params, np.ones(100, np.int32)), model_of(params, np.zeros(100, np.int32))
    assert bits_per_byte(ones, empty) == (math.inf, None, 0, 0)
    assert bits_per_byte(zeros, make_batches(1)).bpb == math.inf
    assert bits_per_byte(ones, []).bpb == math.inf


def test_logits_are_never_whole():
    """By XLA's own memory analysis, a fraction of what logits [b,t,v] in float32 would take."""
    model_cfg = GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=32, vocab_size=1024, sequence_len=64)
    shapes = jax.eval_shape(lambda: gpt.init(model_cfg))
    ids, sizes = jax.ShapeDtypeStruct((2048, 64), jnp.int32), jax.ShapeDtypeStruct((1024,), jnp.int32)
    plan = bpb._sums.lower(shapes, model_cfg, ids, ids, sizes, jnp.float32).compile()
    assert plan.memory_analysis().temp_size_in_bytes < 2048 * 64 * 1024 * 4 / 2
