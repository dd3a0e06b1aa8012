"""A tiny world to train in: a corpus, its tokenizer, and settings with which a step takes milliseconds."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import forked
import jax
import pytest

from nanochat_jax import config
from nanochat_jax.config import GPTConfig
from nanochat_jax.data import sources
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training.loop import train

FLAGS = {
    "depth": 2, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": 64, "total_batch_size": 256,
    "device_batch_size": 2, "num_iterations": 8, "eval_every": -1, "eval_tokens": 256, "core_metric_every": -1,
    "sample_every": -1, "save_every": 2, "compute_dtype": "float32",  # even if the CPU is fast with bfloat16
    "max_epochs": 10_000,  # the text is tiny, and some tests train until they are stopped
}  # fmt: skip
STAGE_FLAGS = {
    "base": set(FLAGS),
    "mid": set(FLAGS) - {"depth", "aspect_ratio", "head_dim", "max_seq_len", "core_metric_every", "sample_every"},
}


def make_world(base: Path) -> None:
    """Makes a corpus of made-up sentences and a tokenizer of 320 tokens in the base folder `base`."""
    rng = random.Random(0)
    words = "the a small large red cat dog tree house sees likes finds near under with and then 12 7 305".split()
    folder = base / "texts"
    folder.mkdir(parents=True)
    documents = [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(400)]
    (folder / "made.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        source = sources.open(data_dir=folder)
    Tokenizer.train(source.texts("train"), 320).save(base / "tokenizer")
    (base / "tokenizer" / "source.json").write_text(json.dumps({"source": "", "data_dir": str(folder)}))


def base_config(**changes) -> config.Base:
    return config.Base(**(FLAGS | changes))


def train_made(base: Path) -> None:
    """Trains a base run called `made` in this process, and keeps its checkpoints of the steps 2, 4, 6 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        train(base_config(model_tag="made", keep_last=9))


def command(stage: str, **changes) -> list[str]:
    """The command line that trains a stage of the tiny model: [python, "-m", "scripts.train", "--stage=base", ...]."""
    flags = {k: v for k, v in FLAGS.items() if k in (STAGE_FLAGS["base"] if stage == "base" else STAGE_FLAGS["mid"])}
    if stage in ("mid", "sft"):
        flags |= {"mixture": "sums=200,identity=50", "val_mixture": "sums=20"}
    if stage == "sft":
        del flags["eval_tokens"]
        flags |= {"eval_metrics_every": -1, "eval_examples": 8}
    if stage == "rl":
        del flags["total_batch_size"], flags["eval_tokens"], flags["max_epochs"]
        flags |= {"mixture": "sums=0", "examples_per_step": 2, "num_samples": 4, "max_new_tokens": 8}
        flags["num_iterations"] = 4
    flags |= changes
    return [sys.executable, "-m", "scripts.train", f"--stage={stage}", *(f"--{k}={v}" for k, v in flags.items())]


def environment(base: Path, devices: int = 1) -> dict[str, str]:
    return os.environ | {"NANOCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}


def xla_flags(devices: int) -> str:
    """Returns the value of XLA_FLAGS for a process with this number of CPU devices."""
    return os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"


def free_address() -> str:
    """A host:port on loopback that nobody listens on yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run(stage: str, base: Path, devices: int = 1, **changes) -> subprocess.CompletedProcess:
    """Trains a stage in its own process, to its end."""
    return forked.run(command(stage, **changes), environment(base, devices))


def random_params(model_cfg: GPTConfig, scale: float) -> gpt.Params:
    """Random weights everywhere, output projections included: the zeros of the real initialization hide mistakes."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: gpt.init(model_cfg)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) * scale for k, x in zip(keys, leaves, strict=True)])
