"""What only an NVIDIA GPU can show: bash tests/run.sh -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanochat_jax import attention, checkpoint, gpt, metrics, optim
from nanochat_jax.config import GPTConfig
from nanochat_jax.run import TrainState
from nanochat_jax.step import estimated_memory, make_step
from nanochat_jax.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU"),
]


@pytest.mark.parametrize("window", [0, 100])
def test_flash_attention_equals_the_blocks_forward_and_backward(window):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, h, 128), jnp.bfloat16) for i, h in enumerate((4, 2, 2)))

    def run():
        spread = lambda *qkv: attention.causal_attention(*qkv, window).astype(jnp.float32).var()  # noqa: E731
        return jax.value_and_grad(spread, (0, 1, 2))(q, k, v)

    assert attention.choose("", jnp.bfloat16)[0] == "cudnn"
    flash = run()
    attention.choose("xla", jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(flash), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=2e-2)


def test_bfloat16_training_step_falls_on_random_tokens():
    cfg = GPTConfig(n_layer=4, n_head=2, n_kv_head=2, n_embd=256, vocab_size=1024, sequence_len=256)
    tx = optim.make_optimizer(256, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, dtype=jnp.bfloat16)
    params = gpt.init(cfg)
    state, step = TrainState(params, tx.init(params)), make_step(cfg, tx, jnp.bfloat16)
    ids = jax.random.randint(jax.random.key(0), (1, 8, 257), 0, 1024)
    losses = []
    for _ in range(20):
        state, results = step(state, {"inputs": ids[..., :-1], "targets": ids[..., 1:]}, jnp.float32(1))
        losses.append(float(results["loss"]))
    assert losses[-1] < losses[0] - 1


def test_a_step_with_flash_attention_equals_one_without():
    cfg = GPTConfig(4, 4, 2, 256, 1024, 512, window_pattern="SL")  # grouped heads, windows of 128
    tx = optim.make_optimizer(256, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, dtype=jnp.bfloat16)
    ids = np.random.default_rng(0).integers(0, 1024, (2, 4, 513), dtype=np.int32)  # two micro-batches
    batch = {"inputs": ids[..., :-1], "targets": ids[..., 1:]}
    results = {}
    for kernel in attention.KERNELS:
        assert attention.choose(kernel, jnp.bfloat16)[0] == kernel
        params = jax.tree.map(lambda p: p + 0.02, gpt.init(cfg))  # away from the zeros of the initialisation
        state, step = TrainState(params, tx.init(params)), make_step(cfg, tx, jnp.bfloat16)
        results[kernel] = [float(x) for x in list(step(state, batch, jnp.float32(1))[1].values())]
    np.testing.assert_allclose(results["cudnn"], results["xla"], rtol=2e-2)


def test_a_run_chooses_kernel_precision_and_batch_by_itself(own_base_dir, capsys):
    tiny.make_world(own_base_dir)
    flags = {"head_dim": 64, "aspect_ratio": 64, "device_batch_size": 0, "max_seq_len": 256, "total_batch_size": 8192}
    train(tiny.base_config(model_tag="auto", **flags))
    said = capsys.readouterr().out
    assert "matmuls in bfloat16 (the GPU has bf16 units), attention by cudnn (tried, it runs)" in said
    assert "1 micro-batches x 32 rows" in said  # all of them fit
    losses = [r["loss"] for r in metrics.read(checkpoint.run_dir("base", "auto")) if r["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_automatic_batch_is_sensible_for_this_memory():
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    assert estimated_memory(GPTConfig(20, 10, 10, 1280, 65536, 2048), 1) < limit
