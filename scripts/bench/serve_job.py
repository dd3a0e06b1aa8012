"""Runs one job for `python -m scripts.bench serve`.

The job "make" creates the model. The job "engine" serves the clients' requests with the engine alone. The only argument
is the job as JSON. The output is one line of JSON.
"""

import json
import random
import string
import sys
import time

import jax
import numpy as np

from nanochat_jax import checkpoint, trained_model
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts.chat_web import CHUNK

STAGE, TAG = "sft", "bench"
SCALE = 0.2  # standard deviation of the random weights, large enough for varied text


def make(job: dict) -> dict:
    """Saves a checkpoint with random weights, and a tokenizer trained on made-up words, to the base folder."""
    rng, size = random.Random(0), job["shape"]["vocab_size"]
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 10))) for _ in range(size)]
    texts = (" ".join(rng.choices(words, k=200)) for _ in range(size // 20 + 10))
    tokenizer = Tokenizer.train(texts, size)
    model_cfg = GPTConfig(**job["shape"] | {"vocab_size": tokenizer.vocab_size})
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: gpt.init(model_cfg)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten([jax.random.normal(k, x.shape) * SCALE for k, x in zip(keys, leaves, strict=True)])
    # Give special tokens a logit of 0, which is never among the top k. So no answer ends early, and no answer calls the
    # calculator.
    params["lm_head"] = params["lm_head"].at[tokenizer.vocab_size - len(SPECIAL_TOKENS) :].set(0)
    tokenizer.save(checkpoint.run_dir(STAGE, TAG).parent.parent / "tokenizer")
    saver = checkpoint.Saver(checkpoint.run_dir(STAGE, TAG), keep_last=1)
    saver.save(1, params, {"count": np.zeros(1)}, {}, checkpoint.model_meta(model_cfg) | {"tokenizer": tokenizer.hash})
    saver.wait_all()
    return {"vocab_size": tokenizer.vocab_size, "params": model_cfg.num_params, "device": jax.devices()[0].device_kind}


def engine(job: dict) -> dict:
    """Measures how long the engine alone takes to serve the requests, and how many tokens it generates.

    The engine has one slot per client. Before timing, it serves one warm-up request per client.
    """
    model = trained_model.load(STAGE, TAG)
    dtype = devices.choose_precision("")
    engine = Engine(model.params, model.model_cfg, model.tokenizer, slots=job["clients"], dtype=dtype, chunk=CHUNK)
    requests = [
        Request(
            request["prompt"], request["max_tokens"], request["temperature"], request["top_k"], seed=request["seed"]
        )
        for request in job["requests"]
    ]
    engine.run(requests[: job["clients"]])
    start = time.perf_counter()
    answers = engine.run(requests[job["clients"] :])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(sample.ids) for group in answers for sample in group)}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    devices.start(job["device_type"])
    print(json.dumps({"make": make, "engine": engine}[job["job"]](job)))
