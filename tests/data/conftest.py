"""A small corpus in two files, and packing buffers that are smaller."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data import documents, hub, packing


@pytest.fixture
def small_buffers(monkeypatch):
    """So that the small corpora of these tests are larger than the packing buffer."""
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", {"split": 12, "crop": 12, "whole": 8})
    monkeypatch.setattr(documents, "TOKENIZE_AT_ONCE", 4)
    monkeypatch.setattr(documents, "RENDER_AT_ONCE", 3)


@pytest.fixture
def files(tmp_path):
    """Two shards of three row groups each; every token of the corpus is a different number, from 10 on."""
    rng, paths, token = np.random.default_rng(0), [], 10
    for i in range(2):
        texts = []
        for _ in range(30):
            length = int(rng.integers(0, 40))  # an empty document now and then
            texts.append(" ".join(str(t) for t in range(token, token + length)))
            token += length
        paths.append(tmp_path / hub.shard_name(i))
        pq.write_table(pa.table({"text": texts}), paths[-1], row_group_size=10)
    return paths


@pytest.fixture
def corpus(files):
    return {int(t) for f in files for text in pq.read_table(f)["text"].to_pylist() for t in text.split()}
