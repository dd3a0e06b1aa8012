"""The model against NanoChatForCausalLM of Hugging Face transformers, live: bash tests/run.sh -m parity.

Needs the extra `parity`. test_gpt.py compares with recorded values of two such models.
"""

import jax
import numpy as np
import pytest

from nanochat_jax import hf
from nanochat_jax.model import gpt

pytestmark = pytest.mark.parity

SHAPES = [  # layers, heads, key/value heads, width, vocabulary (padded in the second and the last)
    (1, 2, 2, 32, 320),
    (3, 4, 1, 64, 300),
    (4, 6, 2, 96, 256),
    (8, 3, 3, 96, 500),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"d{shape[0]}-h{shape[1]}-kv{shape[2]}")
def both(request, tmp_path_factory):
    """(Hugging Face's model, our parameters, our GPTConfig), with the same random float32 weights."""
    torch = pytest.importorskip("torch", reason="torch is missing: install the extra parity")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: install the extra parity")
    layers, heads, kv_heads, width, vocab = request.param
    config = transformers.NanoChatConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=width,
        intermediate_size=4 * width, vocab_size=vocab, max_position_embeddings=64, rms_norm_eps=1.1920929e-07,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,  # so that greedy decoding does not end early
    )  # fmt: skip
    theirs = transformers.NanoChatForCausalLM(config).to(torch.float32).eval()
    noise = torch.Generator().manual_seed(layers)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            # Large enough for the soft cap to matter, and for greedy choices to be unambiguous.
            size = 1.0 if "embed" in name else 2 * p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=noise) * size)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, *hf.load(folder)


def test_logits_equal_transformers(both):
    import torch

    theirs, params, cfg = both
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 48), dtype=np.int64)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = jax.jit(gpt.forward, static_argnums=1)(params, cfg, ids.astype(np.int32))
    assert np.abs(expected).max() > 3  # where the soft cap bends the curve
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_greedy_text_equals_transformers(both):
    import torch

    theirs, params, cfg = both
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 48), dtype=np.int64)
    prompt = torch.from_numpy(ids[:, :8])
    with torch.no_grad():
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40
        ).numpy()
    step = jax.jit(lambda p, x: gpt.forward(p, cfg, x).argmax(-1))  # causal: later tokens change nothing
    ours = ids.astype(np.int32)
    for t in range(8, 48):
        ours[:, t] = step(params, ours)[:, t - 1]
    np.testing.assert_array_equal(ours, expected)
