"""Cached tokens: the same documents at the same positions as in the text, and nothing damaged is ever read."""

import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fake_tokenizer import FakeTokenizer

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import parquet, sources, token_cache
from nanochat_jax.tokenizer import Tokenizer


class Fake(FakeTokenizer):
    hash = "0123456789abcdef"


class Small(Fake):
    vocab_size = 50_000


@pytest.fixture
def source(tmp_path):
    """Three files of three row groups each. The documents are numbers; some are empty, one is null."""
    rng, folder = np.random.default_rng(0), tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "val"):
        texts = [" ".join(map(str, rng.integers(10, 40_000, rng.integers(0, 40)))) for _ in range(30)]
        texts[7], texts[8] = "", None
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet", row_group_size=10)
    return sources.open(data_dir=folder)


def documents(path, tokenizer):
    """[(token ids, numbers of characters) of the documents] by row group, from the text itself."""
    with parquet.open(path) as file:
        groups = [parquet.read_row_group(file, path, i) for i in range(file.num_row_groups)]
    return [(tokenizer.encode(texts), [len(t) for t in texts]) for texts in groups]


@pytest.mark.parametrize(("tokenizer", "dtype"), [(Fake(), np.uint32), (Small(), np.uint16)])
def test_cached_tokens_have_the_documents_of_their_text_at_their_places(tokenizer, dtype, source, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_CHARS", 100)  # so that some are split
    folder = token_cache.build(source, tokenizer)
    assert folder == config.base_dir() / "tokenized_data" / "texts-01234567"
    for path in (*source.train_files, *source.val_files):
        cached, expected = token_cache.find(path, folder), documents(path, tokenizer)
        assert isinstance(cached.tokens, np.memmap) and cached.tokens.dtype == dtype
        assert cached.num_row_groups == len(expected) == 3
        for i, (ids, chars) in enumerate(expected):
            docs, lengths = cached.read(i)
            assert [d.tolist() for d in docs] == ids and lengths.tolist() == chars
        cached.close()


def test_what_is_there_is_kept_and_what_has_changed_is_made_again(source, capsys):
    folder = token_cache.build(source, Fake())
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(times) == 6 and not list(folder.glob("*.part"))
    token_cache.build(source, Fake())
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    path = source.train_files[0]
    pq.write_table(pa.table({"text": ["11 12", "13"]}), path)
    assert token_cache.find(path, folder) is None, "these are of another text"
    token_cache.build(source, Fake())
    assert [d.tolist() for d in token_cache.find(path, folder).read(0).docs] == [[11, 12], [13]]


def test_without_cached_tokens_or_a_folder_there_is_none(source, tmp_path):
    assert token_cache.find(source.train_files[0], None) is None
    assert token_cache.find(source.train_files[0], tmp_path) is None
    folder = token_cache.build(source, Fake())
    (folder / "a.index.npz").unlink()  # as if killed between writing the two files
    assert token_cache.find(source.train_files[0], folder) is None


def test_the_text_may_be_deleted(source):
    folder = token_cache.build(source, Fake())
    expected = documents(source.train_files[0], Fake())
    source.train_files[0].unlink()
    cached = token_cache.find(source.train_files[0], folder)
    assert [d.tolist() for d in cached.read(2).docs] == expected[2][0]


def test_damage_is_named(source):
    folder, path = token_cache.build(source, Fake()), source.train_files[0]
    tokens, index = folder / "a.tokens.npy", folder / "a.index.npz"
    good_tokens, good_index = tokens.read_bytes(), index.read_bytes()

    for place in (len(good_tokens) - 1, len(good_tokens) // 2, 200):
        tokens.write_bytes(good_tokens[:place] + bytes([good_tokens[place] ^ 1]) + good_tokens[place + 1 :])
        with pytest.raises(UserError, match=r"a\.tokens\.npy: row group \d is damaged; delete it and run"):
            for i in range(3):
                token_cache.find(path, folder).read(i)
    for content in (good_tokens[:-4], good_tokens[: len(good_tokens) // 2], b""):
        tokens.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tokens\.npy: "):
            [token_cache.find(path, folder).read(i) for i in range(3)]
    tokens.unlink()
    with pytest.raises(UserError, match=r"a\.tokens\.npy: "):
        token_cache.find(path, folder)
    tokens.write_bytes(good_tokens)

    for place in range(0, len(good_index), 7):
        index.write_bytes(good_index[:place] + bytes([good_index[place] ^ 1]) + good_index[place + 1 :])
        try:
            cached = token_cache.find(path, folder)
            docs = cached and [[d.tolist() for d in cached.read(i).docs] for i in range(3)]
        except UserError as error:
            assert re.search(r"a\.(index\.npz|tokens\.npy): ", str(error)) and "\n" not in str(error)
        else:
            assert docs in (None, [ids for ids, _ in documents(path, Fake())]), place
    index.write_bytes(good_index[:100])
    with pytest.raises(UserError, match=r"a\.index\.npz: cannot be read"):
        token_cache.find(path, folder)


def test_the_command(own_base_dir, monkeypatch):
    pytest.importorskip("rustbpe")
    tiny.make_world(own_base_dir)
    command = [sys.executable, "-m", "nanochat_jax.dataset", "--data_dir", str(own_base_dir / "texts"), "--tokenize"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=config.REPOSITORY, timeout=100)
    assert done.returncode == 0, done.stderr
    source, tokenizer = sources.open(), Tokenizer.load(own_base_dir / "tokenizer")
    folder = token_cache.folder_of(source, tokenizer)
    cached = token_cache.find(source.val_files[0], folder)
    assert [d.tolist() for d in cached.read(0).docs] == documents(source.val_files[0], tokenizer)[0][0]
    assert cached.tokens.dtype == np.uint16 and f"{folder}" in done.stdout
