"""One measurement of generating text, in a process of its own; `python -m scripts.bench decode` runs many of these.

Sent on standard input to our Python or to that of the peer, with the job as JSON in its only argument. Only what
measures ours imports this project. Prints one line of JSON.
"""

import json
import sys
import time
from importlib import metadata

SCALE = 0.02  # of the random weights: text is varied, and numbers are of ordinary size


def probe(job):
    """Whether transformers' NanoChat can run here; its version."""
    try:
        import torch
        from transformers import NanoChatForCausalLM  # noqa: F401
    except Exception as error:  # whatever a broken package comes up with
        return {"python": sys.version.split()[0], "missing": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"python": sys.version.split()[0], "version": f"transformers {metadata.version('transformers')}, torch "
            f"{torch.__version__}"}  # fmt: skip


def device(job):
    """What we run on; bandwidth in bytes/s, None where unknown."""
    import jax

    from nanochat_jax.parallel import devices

    devices.start(job["device_type"])
    kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
    return {"device": kind, "platform": platform, "bandwidth": devices.peak_bandwidth(), "version": jax.__version__}


def ours(job):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanochat_jax.config import GPTConfig
    from nanochat_jax.engine import cache
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request
    from nanochat_jax.model import gpt
    from nanochat_jax.parallel import devices

    class Tokenizer:
        """Names for the special tokens, which is all an engine without tools asks for."""

        def special(self, name):
            return 0

    devices.start(job["device_type"])
    cfg, batch = GPTConfig(**job["shape"]), job["batch"]
    dtype = getattr(jnp, job["dtype"])
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: gpt.init(cfg)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten([jax.random.normal(k, x.shape) * SCALE for k, x in zip(keys, leaves, strict=True)])
    read = sum(x.size for name, x in params.items() if name not in ("wte", "blocks"))
    read += sum(x.size for x in jax.tree.leaves(params["blocks"]))  # of the embedding a row a token is
    engine = Engine(params, cfg, Tokenizer(), slots=batch, dtype=dtype, chunk=job["chunk"])
    del params

    def generate(seed):
        """Seconds to the first token of all rows, and to the end."""
        ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, job["prompt"])).tolist()
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

    generate(seed=0)  # compiles everything
    first, seconds = generate(seed=1)  # other prompts: what is in the cache would not be computed again
    kept = 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * batch * (job["prompt"] + job["new"] / 2)
    read = read * jnp.dtype(dtype).itemsize + kept * cache.dtype_for(dtype).itemsize
    return {"first": first, "seconds": seconds, "bytes": read}


def hf(job):
    """transformers' generate with its key/value cache, as one calls it."""
    import torch
    from transformers import NanoChatConfig, NanoChatForCausalLM, StoppingCriteria, StoppingCriteriaList

    shape, batch = job["shape"], job["batch"]
    where = "cuda" if job["platform"] == "gpu" else "cpu"
    config = NanoChatConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"], intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"], max_position_embeddings=shape["sequence_len"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config).to(where, getattr(torch, job["dtype"])).eval()
    model.generation_config.eos_token_id = None  # it goes on to the end
    model.generation_config.pad_token_id = 0

    def now():
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(StoppingCriteria):
        first = None

        def __call__(self, ids, scores, **_):
            if self.first is None:
                self.first = now()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate(new):
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
        generate(min(8, job["new"]))  # nothing is compiled, but memory is taken and kernels are chosen
        first, seconds = generate(job["new"])
    return {"first": first, "seconds": seconds}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"probe": probe, "device": device, "ours": ours, "hf": hf}[job["job"]](job)))
