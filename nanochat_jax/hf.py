"""Reads checkpoints in the format of NanoChatForCausalLM, a model class in Hugging Face transformers."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model import gpt

# Our name for a weight -> its name in transformers. Our weights are [l, in, out]. In transformers, each layer has its
# own matrix [out, in].
LAYER_NAMES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_in": "mlp.fc1",
    "w_out": "mlp.fc2",
}


def load(folder: Path) -> tuple[gpt.Params, GPTConfig]:
    """Reads config.json and model.safetensors in `folder`. Returns (float32 NumPy parameters, configuration).

    Raises UserError if the model type is not nanochat.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "nanochat":
        raise UserError(f"{folder}: model_type is {config.get('model_type')!r}, not 'nanochat'")
    model_cfg = GPTConfig(
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_kv_head=config["num_key_value_heads"],
        n_embd=config["hidden_size"],
        vocab_size=config["vocab_size"],
        sequence_len=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        softcap=config["final_logit_softcapping"],
    )
    tensors = load_file(folder / "model.safetensors")
    pad = [(0, model_cfg.padded_vocab - model_cfg.vocab_size), (0, 0)]

    def stack(name: str) -> np.ndarray:  # [l, in, out]
        layers = [tensors[f"model.layers.{i}.{LAYER_NAMES[name]}.weight"].T for i in range(model_cfg.n_layer)]
        return np.stack(layers).astype(np.float32)

    params = {
        "wte": np.pad(tensors["model.embed_tokens.weight"].astype(np.float32), pad),
        "lm_head": np.pad(tensors["lm_head.weight"].astype(np.float32), pad),
        "blocks": {name: stack(name) for name in LAYER_NAMES},
    }
    return params, model_cfg
