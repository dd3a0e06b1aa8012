"""The model equals other implementations, is causal, and cached decoding equals the full forward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanochat_jax import hf
from nanochat_jax.config import Base, GPTConfig, UserError
from nanochat_jax.model import gpt
from nanochat_jax.model.attention import causal_attention

CFG = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, vocab_size=100, sequence_len=32)

# Compiled as a whole: running operation by operation takes several times as long.
hidden = jax.jit(gpt.hidden, static_argnums=(1, 3, 4))
decode = jax.jit(gpt.decode, static_argnums=1)
forward = jax.jit(gpt.forward, static_argnums=(1, 3))


@pytest.fixture(scope="module")
def params():
    """Random weights, output projections included: the zeros of the real initialisation would hide mistakes."""
    return tiny.random_params(CFG, 0.1)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["hf_mha", "hf_gqa"])
def test_logits_and_greedy_text_equal_transformers(golden_dir, name):
    params, cfg = hf.load(golden_dir / name)
    expected = np.load(golden_dir / name / "expected.npz")
    tokens, logits, greedy = (expected[k] for k in ("tokens", "logits", "greedy"))
    ours = forward(params, cfg, tokens)
    np.testing.assert_allclose(ours, logits, atol=1e-4)
    ids = np.array(greedy)
    ids[:, 8:] = 0
    step = jax.jit(lambda p, x: gpt.forward(p, cfg, x).argmax(-1))  # causal: the zeros after a token change nothing
    for t in range(8, greedy.shape[1]):
        ids[:, t] = step(params, ids)[:, t - 1]
    np.testing.assert_array_equal(ids, greedy)


@pytest.mark.parametrize(
    ("t", "at"), [(10, 5), (128, 5), (128, 63), (128, 64), (128, 127)]
)  # t = 128 runs in four blocks
def test_gradient_never_reaches_later_tokens(params, t, at):
    ids, cfg = jnp.arange(t)[None], dataclasses.replace(CFG, sequence_len=128, vocab_size=128)

    def logit(embedded):  # perturb the embeddings of the input tokens
        return gpt.forward(params | {"wte": embedded}, cfg, ids)[0, at].sum()

    by_token = jnp.abs(jax.jit(jax.grad(logit))(params["wte"])).sum(-1)[:t]
    assert (by_token[: at + 1] > 0).all() and (by_token[at + 1 :] == 0).all()


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [4, 1, 1, 6]])
def test_cached_decoding_equals_the_full_forward(params, pieces):
    ids = jax.random.randint(jax.random.key(2), (3, 12), 0, CFG.vocab_size)
    full = hidden(params, CFG, ids)
    shape = (3, CFG.n_kv_head, 16, CFG.head_dim)
    cache = {n: [jnp.zeros(shape)] * CFG.n_layer for n in ("k", "v")} | {"length": jnp.zeros(3, jnp.int32)}
    parts, at = [], 0
    for n in pieces:
        x, cache = decode(params, CFG, ids[:, at : at + n], cache)
        parts.append(x)
        at += n
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)


@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, jnp.float32])
def test_cached_decoding_in_bfloat16_whatever_the_cache_is_kept_in(params, cache_dtype):
    ids = jax.random.randint(jax.random.key(2), (3, 12), 0, CFG.vocab_size)
    low = gpt.cast(params, jnp.bfloat16)
    full = hidden(low, CFG, ids, jnp.bfloat16)
    shape = (3, CFG.n_kv_head, 16, CFG.head_dim)
    cache = {n: [jnp.zeros(shape, cache_dtype)] * CFG.n_layer for n in ("k", "v")} | {"length": jnp.zeros(3, jnp.int32)}
    step = jax.jit(functools.partial(gpt.decode, dtype=jnp.bfloat16), static_argnums=1)
    parts = []
    for t in range(12):
        x, cache = step(low, CFG, ids[:, t : t + 1], cache)
        parts.append(x)
    together = jnp.concatenate(parts, 1)
    assert together.dtype == jnp.bfloat16 and cache["k"][0].dtype == cache_dtype
    np.testing.assert_allclose(together.astype(jnp.float32), full.astype(jnp.float32), atol=0.05)


def test_bfloat16_stays_near_float32_and_keeps_float32_gradients(params):
    ids = jnp.arange(20)[None]
    low = forward(params, CFG, ids, jnp.bfloat16)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, forward(params, CFG, ids), atol=0.15)
    gradients = jax.jit(jax.grad(lambda p: gpt.forward(p, CFG, ids, jnp.bfloat16).var()))(params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("i", "o"), [(16, 48), (48, 16), (16, 16)])
def test_gradients_of_a_dense_layer_equal_those_of_autodiff(i, o):
    """Whichever of the two operands is wider."""
    r = np.random.default_rng(0)
    x, w, g = (jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((2, 8, i), (i, o), (2, 8, o)))
    ours = jax.grad(lambda x, w: (gpt.dense(x, w, jnp.float32) * g).sum(), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: ((x @ w) * g).sum(), (0, 1))(x, w)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "count", "flops"),
    [(4, 36_700_160, "1.447e+08"), (12, 185_597_952, "1.038e+09"), (20, 560_988_160, "3.491758e+09"),
     (26, 1_081_999_360, "6.900941e+09"), (30, 1_578_762_240, "1.01332e+10"), (32, 1_879_048_192, "1.207960e+10"),
     (34, 2_217_082_880, "1.42651e+10")],
)  # fmt: skip
def test_size_and_cost_of_the_published_depths(depth, count, flops):
    cfg = Base(depth=depth).gpt_config(65536)
    assert cfg.num_params == count
    assert f"{cfg.flops_per_token:.{len(flops) - 6}e}" == flops  # equal in every published digit


def test_parameter_count_is_that_of_the_arrays():
    assert CFG.num_params == sum(x.size for x in jax.tree.leaves(gpt.init(CFG)))


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_gives_whole_heads(depth):
    """Item 15 of upstream's bugs: odd depths too."""
    cfg = Base(depth=depth).gpt_config(65536)
    assert cfg.head_dim == 128 and cfg.n_embd == cfg.n_head * 128 >= depth * 64


def test_impossible_shapes_name_the_flag():
    with pytest.raises(UserError, match="--n_kv_head=3"):
        Base(depth=4, n_kv_head=3).gpt_config(65536)
    with pytest.raises(UserError, match="--depth=0"):
        Base(depth=0).gpt_config(65536)
    with pytest.raises(UserError, match="--head_dim=33: must be even"):
        Base(head_dim=33).gpt_config(65536)


def test_the_shape_is_made_of_the_settings():
    settings = Base(depth=3, aspect_ratio=40, head_dim=32, n_kv_head=2, max_seq_len=1024, window_pattern="sl")
    cfg = settings.gpt_config(1000)
    assert (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim) == (3, 128, 4, 2, 32)
    assert (cfg.sequence_len, cfg.windows, cfg.vocab_size, cfg.padded_vocab) == (1024, (256, 0, 0), 1000, 1024)


def test_initialisation_a_tensor():
    cfg = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=256, vocab_size=1000, sequence_len=32)
    fresh = gpt.init(cfg, seed=0)
    assert float(fresh["wte"].std()) == pytest.approx(1.0, rel=0.01)
    assert float(fresh["lm_head"].std()) == pytest.approx(0.001, rel=0.01)
    for name in ("wq", "wk", "wv", "w_in"):  # uniform, of standard deviation 1/sqrt(width)
        w = fresh["blocks"][name]
        assert float(w.std()) == pytest.approx(1 / 16, rel=0.02) and float(jnp.abs(w).max()) <= 3**0.5 / 16
        assert float(jnp.abs(w).max()) == pytest.approx(3**0.5 / 16, rel=0.01)
    assert not fresh["blocks"]["wo"].any() and not fresh["blocks"]["w_out"].any()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(fresh))
    same, other = gpt.init(cfg, seed=0), gpt.init(cfg, seed=1)
    np.testing.assert_array_equal(same["wte"], fresh["wte"])
    assert (other["wte"] != fresh["wte"]).any()


def test_padding_of_the_vocabulary_changes_nothing(params):
    ids = jnp.arange(10)[None]
    padded = params | {n: params[n].at[CFG.vocab_size :].set(jnp.inf) for n in ("wte", "lm_head")}
    assert params["lm_head"].shape == (128, 64)
    logits = forward(padded, CFG, ids)
    assert logits.shape == (1, 10, 100)
    np.testing.assert_array_equal(logits, forward(params, CFG, ids))


@pytest.mark.parametrize("window", [0, 1, 20, 64])
@pytest.mark.parametrize("t", [7, 64, 128, 256])
def test_attention_in_blocks_equals_jax(t, window):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, t, h, 8)) for i, h in enumerate((4, 2, 2)))
    local = (window, 0) if window else None
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=local)
    ours = functools.partial(causal_attention, window=window)

    def both(f):
        """The result of f and its gradients."""
        weigh = jax.random.normal(jax.random.key(3), q.shape)
        return jax.jit(lambda *qkv: (f(*qkv), jax.grad(lambda *qkv: (f(*qkv) * weigh).sum(), (0, 1, 2))(*qkv)))(q, k, v)

    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_more_tokens_than_the_context_are_refused(params):
    with pytest.raises(UserError, match="a row has 33 tokens, but the context holds only 32"):
        gpt.hidden(params, CFG, jnp.zeros((1, 33), jnp.int32))


# -----------------------------------------------------------------------------
# Windows, scanned layers, recomputation

WINDOWED = dataclasses.replace(CFG, n_layer=4, sequence_len=256, window_pattern="SSL")


def test_windows_repeat_and_the_last_layer_sees_everything():
    assert WINDOWED.windows == (128, 128, 0, 0)
    assert GPTConfig(n_layer=6, window_pattern="SSSL").windows == (512, 512, 512, 0, 512, 0)
    assert GPTConfig(n_layer=3, sequence_len=64, window_pattern="SSL").windows == (
        0,
        0,
        0,
    )  # the context is shorter than a window
    with pytest.raises(UserError, match="'SXL'"):
        GPTConfig(window_pattern="SXL")


def test_windows_cost_fewer_flops():
    full, windowed = (GPTConfig(n_layer=4, window_pattern=w) for w in ("L", "SSSL"))
    assert full.flops_per_token - windowed.flops_per_token == 12 * 768 * 3 * (2048 - 512)


@pytest.fixture(scope="module")
def windowed_params():
    return tiny.random_params(WINDOWED, 0.1)


def test_a_token_reaches_exactly_its_windows(windowed_params):
    """Each windowed layer reaches 128 tokens further back, so only the output of the first layer is compared."""
    one = dataclasses.replace(WINDOWED, n_layer=2, window_pattern="SL")
    params = windowed_params | {"blocks": {n: w[:2] for n, w in windowed_params["blocks"].items()}}
    params["blocks"] |= {n: params["blocks"][n].at[1].set(0) for n in ("wo", "w_out")}  # the second layer adds nothing
    ids = jnp.arange(200)[None] % CFG.vocab_size
    changed = ids.at[0, 20].add(1)
    differs = jnp.abs(hidden(params, one, ids) - hidden(params, one, changed)).max(-1)[0] > 0
    assert np.flatnonzero(differs).tolist() == list(range(20, 20 + 128 + 1))


def test_cached_decoding_respects_windows(windowed_params):
    ids = jax.random.randint(jax.random.key(2), (2, 180), 0, CFG.vocab_size)
    full = hidden(windowed_params, WINDOWED, ids)
    shape = (2, WINDOWED.n_kv_head, 256, WINDOWED.head_dim)
    cache = {n: [jnp.zeros(shape)] * 4 for n in ("k", "v")} | {"length": jnp.zeros(2, jnp.int32)}
    parts = []
    for at, n in ((0, 150), (150, 29), (179, 1)):
        x, cache = decode(windowed_params, WINDOWED, ids[:, at : at + n], cache)
        parts.append(x)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=5e-5)


@pytest.mark.parametrize(
    "pattern", [pytest.param("L", marks=pytest.mark.slow), "SL", pytest.param("SSL", marks=pytest.mark.slow)]
)
def test_scanned_and_recomputed_layers_give_the_same_numbers(windowed_params, pattern):
    cfg = dataclasses.replace(WINDOWED, window_pattern=pattern)
    ids = jax.random.randint(jax.random.key(3), (2, 192), 0, CFG.vocab_size)

    def run(execution):
        f = jax.value_and_grad(lambda p: gpt.hidden(p, cfg, ids, jnp.float32, execution).var())
        return jax.jit(f)(windowed_params)

    plain = run(gpt.PLAIN)
    for other in (
        gpt.Execution(scan=True),
        gpt.Execution(remat_policy=jax.checkpoint_policies.nothing_saveable),
        gpt.Execution(scan=True, remat_policy=jax.checkpoint_policies.save_only_these_names(gpt.MATMUL)),
    ):
        for a, b in zip(jax.tree.leaves(run(other)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_recomputation_saves_memory(windowed_params):
    ids = jnp.zeros((8, 64), jnp.int32)
    cfg = dataclasses.replace(WINDOWED, window_pattern="L")

    def memory(execution):
        f = jax.grad(lambda p: gpt.hidden(p, cfg, ids, jnp.float32, execution).var())
        return jax.jit(f).lower(windowed_params).compile().memory_analysis().temp_size_in_bytes

    full = memory(gpt.Execution(scan=True, remat_policy=jax.checkpoint_policies.nothing_saveable))
    matmuls = memory(gpt.Execution(scan=True, remat_policy=jax.checkpoint_policies.save_only_these_names(gpt.MATMUL)))
    assert full < matmuls < memory(gpt.Execution(scan=True))
