"""A learning curve: the loss of a tiny model over 200 steps on real text falls as it did when it was recorded.

    PYTHONPATH=.:tests/support python tests/training/test_curve.py     # re-records tests/recorded/curve.json

Its text comes from $NANOCHAT_TEST_DATA. Record it again only for changes that are meant to change what is learned.
"""

import gzip
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import REPOSITORY
from nanochat_jax.data import sources
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training.loop import train

CURVE = REPOSITORY / "tests" / "recorded" / "curve.json"
TEXT = "textbooks_openstax.jsonl.gz"
SETTINGS = {
    "depth": 2, "aspect_ratio": 32, "head_dim": 32, "n_kv_head": 1, "max_seq_len": 128, "total_batch_size": 1024,
    "device_batch_size": 4, "num_iterations": 200, "save_every": -1, "compute_dtype": "float32", "device_type": "cpu",
}  # fmt: skip
# How far rounding moves these means:
#   2e-7 in float32 (1, 2 and 8 devices; micro-batches of 1, 4 and 8 rows; scanned layers; AVX2 and AVX-512)
#   2e-4 with the operands of the blocks' matmuls rounded to bfloat16
# Mistakes move them more:
#   Muon: 0.012 without its scale by shape, 0.034 with the scale of the transpose, 0.020 without Nesterov momentum,
#   0.026 with a constant momentum, 0.011 with 4 iterations, 0.12 with its learning rate scaled by the width
#   AdamW: 0.60 with learning rates not scaled, 4.1 with them swapped, 0.29 with the head's as high as the matrices',
#   0.15 with the embedding's as low as the matrices'; 0.025 with b1 = 0.9, 0.007 with b2 = 0.99, 0.0016 with eps = 1e-8
#   schedule: 0.052 with decay from 60% of the steps, 0.0014 with decay to a tenth of the learning rate
# Another seed moves them by 0.026, and so does a JAX version that draws other random numbers.
TOLERANCE = 0.001


def curve(text: Path, base: Path) -> list[float]:
    """The mean loss of every 20 steps of pretraining on the file `text`, in the base folder `base`."""
    folder = base / "texts"
    folder.mkdir(parents=True)
    with gzip.open(text, "rb") as file:
        lines = file.readlines()
    (folder / "train.jsonl").write_bytes(b"".join(lines[: -(len(lines) // 100)]))
    (folder / "val.jsonl").write_bytes(b"".join(lines[-(len(lines) // 100) :]))
    Tokenizer.train(sources.open(data_dir=folder).texts("train"), 1024).save(base / "tokenizer")
    train(tiny.base_config(data_dir=str(folder), model_tag="curve", **SETTINGS))
    losses = [r["loss"] for r in run_log.read(checkpoint.run_dir("base", "curve")) if r["kind"] == "train"]
    return np.reshape(losses, (-1, 20)).mean(1).tolist()


@pytest.mark.slow
def test_200_steps_fall_along_the_recorded_curve(data_dir, own_base_dir):
    recorded = json.loads(CURVE.read_text())["losses"]
    actual = curve(data_dir / "pretrain" / TEXT, own_base_dir)
    np.testing.assert_allclose(actual, recorded, rtol=0, atol=TOLERANCE)


def record() -> None:
    data = Path(os.environ.get("NANOCHAT_TEST_DATA") or REPOSITORY.parent / "shared") / "data"
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        losses = [round(loss, 5) for loss in curve(data / "pretrain" / TEXT, Path(base))]
    CURVE.write_text(json.dumps({"jax": version("jax"), "losses": losses}) + "\n")


if __name__ == "__main__":
    record()
