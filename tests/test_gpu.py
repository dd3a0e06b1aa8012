"""Tests that need an NVIDIA GPU: bash tests/run.sh -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.model import attention, gpt
from nanochat_jax.model.fused import trial
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import optim
from nanochat_jax.training.batch_shape import estimated_memory
from nanochat_jax.training.loop import train
from nanochat_jax.training.run import compile_step, open_run, peak_memory
from nanochat_jax.training.step import TrainState, make_step

pytestmark = pytest.mark.gpu

HEADS = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=512, sequence_len=256)


@pytest.fixture(autouse=True)
def gpu(request):
    """Whoever selects the GPU tests has a GPU, so a GPU that JAX does not see is a failure."""
    if jax.default_backend() == "gpu":
        return
    if request.config.getoption("markexpr") == "gpu":
        pytest.fail(f"JAX sees no GPU, only {jax.devices()}: python -m scripts.doctor looks for the cause")
    pytest.skip("no GPU")


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Compares by norm: a single number may be near zero, where its relative error says nothing."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.fixture(autouse=True)
def chosen_before(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", "xla")


@pytest.mark.parametrize("window", [0, 100])
def test_flash_attention_equals_the_blocks_forward_and_backward(window):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, h, 128), jnp.bfloat16) for i, h in enumerate((4, 2, 2)))

    def run():
        spread = lambda *qkv: attention.causal_attention(*qkv, window).astype(jnp.float32).var()  # noqa: E731
        return jax.value_and_grad(spread, (0, 1, 2))(q, k, v)

    assert attention.choose_kernel("", jnp.bfloat16, HEADS)[0] == "cudnn"
    flash = run()
    attention.choose_kernel("xla", jnp.bfloat16, HEADS)
    for a, b in zip(jax.tree.leaves(flash), jax.tree.leaves(run()), strict=True):
        assert_close(a, b, tolerance=2e-2)


def test_bfloat16_training_step_falls_on_random_tokens():
    cfg = GPTConfig(n_layer=4, n_head=2, n_kv_head=2, n_embd=256, vocab_size=1024, sequence_len=256)
    tx = optim.make_optimizer(256, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, dtype=jnp.bfloat16)
    params = gpt.init(cfg)
    state, step = TrainState(params, tx.init(params)), make_step(cfg, tx, jnp.bfloat16)
    ids = jax.random.randint(jax.random.key(0), (1, 8, 257), 0, 1024)
    losses = []
    for _ in range(20):
        state, metrics = step(state, {"inputs": ids[..., :-1], "targets": ids[..., 1:]}, jnp.float32(1))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 1


def test_a_step_with_flash_attention_equals_one_without():
    cfg = GPTConfig(4, 4, 2, 256, 1024, 512, window_pattern="SL")  # grouped heads, windows of 128
    tx = optim.make_optimizer(256, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, dtype=jnp.bfloat16)
    ids = np.random.default_rng(0).integers(0, 1024, (2, 4, 513), dtype=np.int32)  # two micro-batches
    batch = {"inputs": ids[..., :-1], "targets": ids[..., 1:]}
    results = {}
    for kernel in attention.KERNELS:
        assert attention.choose_kernel(kernel, jnp.bfloat16, cfg)[0] == kernel
        params = jax.tree.map(lambda p: p + 0.02, gpt.init(cfg))  # away from the zeros of the initialisation
        state, step = TrainState(params, tx.init(params)), make_step(cfg, tx, jnp.bfloat16)
        _, metrics = step(state, batch, jnp.float32(1))
        results[kernel] = [float(metrics.loss), float(metrics.grad_norm), float(metrics.count)]
    np.testing.assert_allclose(results["cudnn"], results["xla"], rtol=2e-2)


def test_the_fused_block_is_right_and_faster_on_a_hopper():
    cfg = GPTConfig(n_layer=2, n_head=10, n_kv_head=10, n_embd=1280, vocab_size=1024, sequence_len=2048)
    attention.choose_kernel("", jnp.bfloat16, cfg)
    chosen, reason = trial.choose(cfg, jnp.bfloat16)
    print(reason)
    assert chosen == (jax.devices()[0].compute_capability == trial.CAPABILITY), reason


def test_a_run_chooses_kernel_precision_and_batch_by_itself(own_base_dir, capsys):
    tiny.make_world(own_base_dir)
    flags = {
        "head_dim": 64, "aspect_ratio": 64, "device_batch_size": 0, "max_seq_len": 256, "compute_dtype": "",
        "total_batch_size": 8192 * jax.device_count(),
    }  # fmt: skip
    train(tiny.base_config(model_tag="auto", **flags))
    printed = capsys.readouterr().out
    assert "matmuls in bfloat16 (the GPU has bf16 units), attention by cudnn (it passed a trial run)" in printed
    assert "1 gradient accumulation step x 32 rows" in printed  # all of them fit
    losses = [r["loss"] for r in run_log.read(checkpoint.run_dir("base", "auto")) if r["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_recomputation_saves_memory_in_layers_that_are_not_scanned():
    cfg = GPTConfig(8, 4, 4, 512, 1024, 1024)
    params, ids = jax.eval_shape(lambda: gpt.init(cfg)), jnp.zeros((8, 1024), jnp.int32)

    def memory(execution):
        f = jax.grad(lambda p: gpt.hidden(p, cfg, ids, jnp.bfloat16, execution).astype(jnp.float32).var())
        return jax.jit(f).lower(params).compile().memory_analysis().temp_size_in_bytes

    full = memory(gpt.Execution(remat_policy=jax.checkpoint_policies.nothing_saveable))
    matmuls = memory(gpt.Execution(remat_policy=jax.checkpoint_policies.save_only_these_names(gpt.MATMUL)))
    assert full < matmuls < memory(gpt.PLAIN)


def test_memory_as_compiled_is_what_a_step_takes(own_base_dir):
    """The analysis of the compiled step is close to the real peak, and the estimate is of the same order."""
    tiny.make_world(own_base_dir)
    flags = {
        "head_dim": 64, "aspect_ratio": 64, "depth": 4, "max_seq_len": 1024, "compute_dtype": "",
        "total_batch_size": 65536 * jax.device_count(),
    }  # fmt: skip
    with open_run(tiny.base_config(model_tag="memory", device_batch_size=64, **flags), 0.95) as run:
        needed = peak_memory(compile_step(run, 1, 64))
        estimated = estimated_memory(run.model_cfg, 64)
    train(tiny.base_config(model_tag="memory", device_batch_size=64, **flags))
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    assert peak < 1.1 * needed and 0.25 * needed < estimated < 4 * needed


def test_the_next_chunk_is_in_flight_and_the_tokens_are_the_same():
    tokenizer = Tokenizer.train(["12 * 3 = 36, hello there, what is 7 + 5?"] * 3, 280)
    model_cfg = GPTConfig(2, 4, 2, 256, tokenizer.vocab_size, 256)
    requests = [Request(list(range(9)), max_tokens=90, n=3, seed=i, stop_ids=(), tools=False) for i in range(2)]
    params, answers = tiny.random_params(model_cfg, 0.1), []
    for asynchronous in (False, None):
        engine, flights = Engine(params, model_cfg, tokenizer, asynchronous=asynchronous), []
        schedule = engine._scheduler.schedule

        def noted(schedule=schedule, flights=flights):
            flights.append(schedule())
            return flights[-1]

        engine._scheduler.schedule = noted
        answers.append([[(sample.ids, sample.mask) for sample in samples] for samples in engine.run(requests)])
        assert any(made.in_flight for made in flights) == (asynchronous is None)
    assert answers[0] == answers[1]
