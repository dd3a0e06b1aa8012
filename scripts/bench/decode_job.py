"""Runs one measurement of text generation for `python -m scripts.bench decode`.

The benchmark pipes this file into its own Python or into the peer's Python, which has transformers. The only argument
is the job as JSON. The output is one line of JSON. Only the jobs "device" and "ours" import this project, because the
peer's Python may lack it.
"""

from __future__ import annotations  # the peer's Python may be an older version

import json
import sys
import time
from importlib import metadata
from typing import Any

Job = dict[str, Any]
SCALE = 0.02  # standard deviation of the random weights; gives varied text and activations of the usual size


def probe(job: Job) -> dict:
    """Returns the versions of transformers and torch, or the reason why NanoChat cannot be imported."""
    python = sys.version.split()[0]
    try:
        import torch  # ty: ignore[import-not-found]  # only in the peer's environment
        from transformers import NanoChatForCausalLM  # noqa: F401  # ty: ignore[import-not-found]
    except Exception as error:  # importing a broken package may raise any exception
        return {"python": python, "missing": f"{type(error).__name__}: {error}".splitlines()[0]}
    version = f"transformers {metadata.version('transformers')}, torch {torch.__version__}"
    return {"python": python, "version": version}


def device(job: Job) -> dict:
    """Describes the device that our engine runs on. `bandwidth` is in bytes/s, or None if unknown."""
    import jax

    from nanochat_jax.parallel import devices

    devices.start(job["device_type"])
    kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
    return {"device": kind, "platform": platform, "bandwidth": devices.peak_bandwidth(), "version": jax.__version__}


def ours(job: Job) -> dict:
    """Measures our engine.

    `first` is the time in seconds until every row has its first token. `seconds` is the total time. `bytes` is the
    number of bytes that a decoding step reads.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanochat_jax.config import GPTConfig
    from nanochat_jax.engine import cache
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request
    from nanochat_jax.model import gpt
    from nanochat_jax.parallel import devices
    from nanochat_jax.tokenizer import Tokenizer

    class NoTokenizer(Tokenizer):
        """Replaces the tokenizer. Without tools, the engine needs only the ids of special tokens."""

        def __init__(self):
            pass

        def special(self, name: str) -> int:
            return 0

    devices.start(job["device_type"])
    model_cfg, batch = GPTConfig(**job["shape"]), job["batch"]
    dtype = getattr(jnp, job["dtype"])
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: gpt.init(model_cfg)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten([jax.random.normal(k, x.shape) * SCALE for k, x in zip(keys, leaves, strict=True)])
    # Count all weights except the embedding, because a step reads only one embedding row per token.
    weights = sum(x.size for name, x in params.items() if name not in ("wte", "blocks"))
    weights += sum(x.size for x in jax.tree.leaves(params["blocks"]))
    engine = Engine(params, model_cfg, NoTokenizer(), slots=batch, dtype=dtype, chunk=job["chunk"])
    del params

    def generate(seed: int) -> tuple[float, float]:
        ids = np.random.default_rng(seed).integers(0, model_cfg.vocab_size, (batch, job["prompt"])).tolist()
        requests = [Request(row, job["new"], temperature=0, stop_ids=(), tools=False) for row in ids]
        begun, first, start = set(), 0.0, time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.busy:
            events = engine.step()
            if len(begun) < batch:
                begun.update(event.request for event in events)
                first = time.perf_counter() - start
        return first, time.perf_counter() - start

    generate(seed=0)  # the warm-up, which compiles everything
    first, seconds = generate(seed=1)  # other prompts, since the prefix cache holds the warm-up's prompts
    positions = batch * (job["prompt"] + job["new"] / 2)  # cached positions in the whole batch, averaged over the steps
    cached = 2 * model_cfg.n_layer * model_cfg.n_kv_head * model_cfg.head_dim * positions
    read = weights * jnp.dtype(dtype).itemsize + cached * cache.dtype_for(dtype).itemsize
    return {"first": first, "seconds": seconds, "bytes": read}


def hf(job: Job) -> dict:
    """Measures transformers' `generate` with a KV cache. `first` and `seconds` mean the same as in `ours`."""
    import torch  # ty: ignore[import-not-found]
    from transformers import (  # ty: ignore[import-not-found]
        NanoChatConfig,
        NanoChatForCausalLM,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    shape, batch = job["shape"], job["batch"]
    where = "cuda" if job["platform"] == "gpu" else "cpu"
    config = NanoChatConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"], intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"], max_position_embeddings=shape["sequence_len"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config).to(where, getattr(torch, job["dtype"])).eval()
    model.generation_config.eos_token_id = None  # so that no answer ends early
    model.generation_config.pad_token_id = 0

    def now() -> float:
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(StoppingCriteria):
        first: Any = None

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if self.first is None:
                self.first = now()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate(new: int) -> tuple[float, float]:
        clock, start = Clock(), now()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, max_new_tokens=new,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        end = now()
        assert out.shape[1] == job["prompt"] + new, f"{out.shape[1] - job['prompt']} tokens instead of {new}"
        return clock.first - start, end - start

    with torch.inference_mode():
        ids = torch.randint(0, shape["vocab_size"], (batch, job["prompt"]), device=where)
        generate(min(8, job["new"]))  # the warm-up, which allocates memory and chooses kernels
        first, seconds = generate(job["new"])
    return {"first": first, "seconds": seconds}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"probe": probe, "device": device, "ours": ours, "hf": hf}[job["job"]](job)))
