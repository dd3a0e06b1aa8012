"""Text sources: folders in several formats, files that are wrong, the local corpus, and waiting for shards."""

import ast
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, local_corpus, parquet, sources


def write_jsonl(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: texts}), path, row_group_size=4)


# -----------------------------------------------------------------------------
# Folders


def test_a_folder_of_jsonl_is_converted_once(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(20)] + [""])
    write_jsonl(tmp_path / "b.jsonl.gz", [f"b{i} \u00e9" for i in range(10)])
    (tmp_path / "val.txt").write_text("one paragraph\n\nanother \u00fc", encoding="utf-8")
    source = sources.open(data_dir=tmp_path)
    assert sorted(source.texts("train")) == sorted([f"a{i}" for i in range(20)] + [f"b{i} \u00e9" for i in range(10)])
    assert list(source.texts("val")) == ["one paragraph\n\nanother \u00fc"]
    assert list(source.texts("train")) != sorted(source.texts("train")), "files are mixed"
    assert source.train_files[0].is_relative_to(config.base_dir() / "data")

    capsys.readouterr()
    assert sources.open(data_dir=tmp_path) == source and "converting" not in capsys.readouterr().out
    write_jsonl(tmp_path / "a.jsonl", ["changed"])
    assert sources.open(data_dir=tmp_path).hash != source.hash


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A converted folder with several training files, and the folder of these files."""
    monkeypatch.setattr(parquet, "SHARD_CHARS", 3)
    monkeypatch.setattr(parquet, "ROW_GROUP", 4)
    write_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(20)])
    write_jsonl(tmp_path / "val.jsonl", [f"v{i}" for i in range(8)])
    source = sources.open(data_dir=tmp_path)
    assert len(source.train_files) == 5 and len(source.val_files) == 2
    return tmp_path, source.train_files[0].parent


def without_sizes(manifest):
    """A manifest as an early version wrote it."""
    notes = json.loads(manifest.read_text())
    del notes["sizes"]
    manifest.write_text(json.dumps(notes))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["train_00000", "train_00004", "val_00001"])
def test_a_file_of_a_converted_folder_that_is_missing_is_noticed(converted, name, early):
    folder, built = converted
    if early:
        without_sizes(built / "manifest.json")
    before = sources.open(data_dir=folder)
    assert len(before.train_files) == 5 and sorted(before.texts("train")) == sorted(f"a{i}" for i in range(20))
    (built / f"{name}.parquet").unlink()
    what = rf"{name[:-6]}_\*\.parquet have \d+ documents instead of \d+" if early else rf"{name}\.parquet is missing"
    message = rf"^{built} is damaged \({what}\): delete this folder, and scripts\.tok_train writes it again$"
    with pytest.raises(UserError, match=message):
        sources.open(data_dir=folder)
    shutil.rmtree(built)
    assert sources.open(data_dir=folder) == replace(before, about=sources.open(data_dir=folder).about)


def test_a_converted_file_that_changed_is_noticed_and_one_that_was_added_is_not_read(converted):
    folder, built = converted
    shutil.copy(built / "train_00000.parquet", built / "train_00009.parquet")
    assert len(sources.open(data_dir=folder).train_files) == 5
    write_parquet(built / "train_00002.parquet", ["other", "text"])
    with pytest.raises(UserError, match=r"train_00002\.parquet has [\d,]+ bytes instead of [\d,]+\): delete this"):
        sources.open(data_dir=folder)


@pytest.mark.parametrize("text", ['{"source": "x", "ha', "", "[]", '{"source": "x"}', None])
def test_a_torn_manifest_is_one_line(converted, text):
    folder, built = converted
    (built / "manifest.json").unlink()
    if text is not None:
        (built / "manifest.json").write_text(text)
    what = "is missing" if text is None else "cannot be read"
    with pytest.raises(UserError, match=rf"^{built} is damaged \(manifest\.json {what}\): delete this") as caught:
        sources.open(data_dir=folder)
    assert "\n" not in str(caught.value)
    if text in ("", "[]"):  # it may have named the text that is read without a flag
        with pytest.raises(UserError, match=rf"^{built} is damaged"):
            sources.open()


def test_parquet_files_are_read_in_place(tmp_path):
    for name in ("val", "b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(10)])
    source = sources.open(data_dir=tmp_path)
    assert [p.name for p in source.train_files] == ["a.parquet", "b.parquet"]
    assert [p.name for p in source.val_files] == ["val.parquet"]
    assert source.train_files[0].parent == tmp_path
    assert list(source.texts("train")) == [f"{n}{i}" for n in "ab" for i in range(10)]


def test_a_large_text_file_is_split_between_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "word " * 100 for i in range(100)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    source = sources.open(data_dir=tmp_path)
    documents = [*source.texts("train"), *source.texts("val")]
    assert sorted(p for d in documents for p in d.split("\n\n")) == sorted(paragraphs)
    assert len(documents) > 3


BAD = {
    "broken.parquet": (b"not parquet at all", "broken.parquet: not a readable parquet file"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text": \n', "broken.jsonl, line 2: not JSON"),
    "other.jsonl": (b'{"txt": "hello"}\n', 'other.jsonl, line 1: expected {"text": "..."}'),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl, line 1"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "latin.txt: cannot be read"),
    "latin.jsonl": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2: not UTF-8"),
    "nested.jsonl": (b"[" * 100_000, "nested.jsonl, line 1: not JSON"),
    "empty.parquet": (b"", "empty.parquet: not a readable parquet file"),
    "blank.jsonl": (b'{"text": ""}\n{"text": "  \\n"}\n', "blank.jsonl: no documents"),
    "broken.jsonl.gz": (b"\x1f\x8b not gzip", "broken.jsonl.gz: cannot be read"),
    "empty.txt": (b"", "empty.txt: no documents"),
    "empty.jsonl": (b"\n\n", "empty.jsonl: no documents"),
    "one.txt": (b"one document", "in: one document cannot be both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_nothing_half_made_is_left(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        sources.open(data_dir=tmp_path / "in")
    assert "\n" not in str(caught.value)
    assert not list(config.base_dir().glob("data/*"))


def test_truncated_gzip_is_named(tmp_path):
    write_jsonl(tmp_path / "cut.jsonl.gz", [str(i) for i in range(1000)])
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        sources.open(data_dir=tmp_path)


def test_a_file_that_is_damaged_inside_is_named_when_it_is_read(tmp_path):
    texts = [hashlib.sha256(str(i).encode()).hexdigest() * 20 for i in range(400)]
    for name in ("a", "val"):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=100)
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    where = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    content[where : where + 200] = b"\xff" * 200
    path.write_bytes(content)
    texts = sources.open(data_dir=tmp_path).texts("train")
    assert [next(texts) for _ in range(200)], "everything before it is readable"
    with pytest.raises(UserError, match=r"a\.parquet: row group 2 cannot be read .*--verify") as caught:
        next(texts)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    write_parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    with pytest.raises(UserError, match=r"b\.parquet: no documents"):
        sources.open(data_dir=tmp_path)


def test_documents_that_are_empty_or_not_utf8_are_skipped_and_named(tmp_path, capsys):
    bad = pa.array([b"one", b"caf\xe9", b"", None, "f\u00fcnf".encode(), b"\xff"])
    strings = pa.Array.from_buffers(pa.string(), len(bad), bad.buffers(), bad.null_count)  # as a careless writer does
    for kind, column in (("binary", bad), ("val_string", strings)):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{kind}.parquet")
    source = sources.open(data_dir=tmp_path)
    assert list(source.texts("train")) == list(source.texts("val")) == ["one", "f\u00fcnf"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[-1] for line in lines] == [
        f"{kind}.parquet: row group 0: 2 of 6 documents are not UTF-8, skipped" for kind in ("binary", "val_string")
    ]
    with parquet.open(source.train_files[0]) as file:
        texts = parquet.read_row_group(file, source.train_files[0], 0)
    assert texts == ["one", "", "", "", "f\u00fcnf", ""], "their positions are kept, so that they can be counted"


def test_a_conversion_counts_what_it_met(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["fine", "", "also fine", " ", "x" * 2_500_000, "half an emoji \ud83d"])
    write_jsonl(tmp_path / "val.jsonl", ["fine"])
    source = sources.open(data_dir=tmp_path)
    assert "7 documents, 2 empty, skipped, 1 longer than 1,000,000 characters, split" in capsys.readouterr().out
    notes = json.loads((source.train_files[0].parent / "manifest.json").read_text(encoding="utf-8"))
    assert notes["met"]["empty, skipped"] == 2
    assert sorted(map(len, source.texts("train"))) == [4, 9, 14, 500_000, 1_000_000, 1_000_000]
    assert "half an emoji " in set(source.texts("train"))


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "txt", "parquet"])
def test_a_document_of_50_mb_is_split_and_nothing_of_it_is_lost(form, tmp_path):
    lines = [f"line {i} of a very long document, with some words in it" for i in range(850_000)]
    text = "\n".join(lines)
    assert len(text) > 50_000_000
    (tmp_path / "in").mkdir()
    for name, content in (("a", text), ("val", "validation")):
        path = tmp_path / "in" / f"{name}.{form}"
        if form == "txt":
            path.write_text(content, encoding="utf-8")
        else:
            (write_parquet if form == "parquet" else write_jsonl)(path, [content])
    start = time.monotonic()
    pieces = list(sources.open(data_dir=tmp_path / "in").texts("train"))
    assert max(map(len, pieces)) <= parquet.MAX_CHARS and time.monotonic() - start < 20
    whole = [line for piece in pieces for line in piece.splitlines()]
    assert sorted(whole) == sorted(lines), "split between lines, and every line is there"
    if form == "parquet":
        assert "".join(pieces) == text


def test_a_document_without_a_place_to_split_is_split_anywhere(tmp_path):
    for name in ("a", "val"):
        write_parquet(tmp_path / f"{name}.parquet", [("x" if name == "a" else "y") * 2_500_000])
    pieces = list(sources.open(data_dir=tmp_path).texts("train"))
    assert [len(p) for p in pieces] == [1_000_000, 1_000_000, 500_000]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    source = sources.open(data_dir=tmp_path)
    assert [*source.texts("train"), *source.texts("val")] == ["one", "two"]


def test_the_validation_hash_is_that_of_the_validation_text_alone(tmp_path):
    for name in ("a", "b", "val"):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(10)])
    before = sources.open(data_dir=tmp_path).val_hash()
    write_parquet(tmp_path / "a.parquet", ["other"])
    assert sources.open(data_dir=tmp_path).val_hash() == before
    write_parquet(tmp_path / "val.parquet", ["another"])
    assert sources.open(data_dir=tmp_path).val_hash() != before


def test_a_missing_column_is_named(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", ["x"], column="content")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; its columns: content"):
        sources.open(data_dir=tmp_path)


def test_a_column_that_is_no_text_is_named(tmp_path):
    """pyarrow would convert numbers to text."""
    for name in "ab":
        pq.write_table(pa.table({"text": [1, 2]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column 'text' holds int64, expected string"):
        sources.open(data_dir=tmp_path)
    (tmp_path / "b.parquet").unlink()
    for name, kind in (("a", pa.large_string()), ("val", pa.dictionary(pa.int32(), pa.string()))):
        write_parquet(tmp_path / f"{name}.parquet", pa.array(["x", "y"]).cast(kind))
    source = sources.open(data_dir=tmp_path)
    assert list(source.texts("train")) == list(source.texts("val")) == ["x", "y"]


def test_folders_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sources.open(data_dir=tmp_path / "nowhere")
    with pytest.raises(UserError, match="no files ending in"):
        sources.open(data_dir=tmp_path)
    with pytest.raises(UserError, match="--data=wikipedia: unknown source, expected fineweb-edu, climbmix or local"):
        sources.open("wikipedia")


def test_the_tokenizers_source_is_the_default(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    record = config.base_dir() / "tokenizer" / "source.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"source": None, "data_dir": str(tmp_path)}), encoding="utf-8")
    assert sources.open().name == tmp_path.name


def test_real_text(data_dir):
    source = sources.open(data_dir=data_dir / "pretrain")
    texts = list(source.texts("train"))
    held_out = list(source.texts("val"))
    assert len(texts) + len(held_out) == 3192 + 141 + 618 + 299 + 2335 and 40 < len(held_out) < 100
    assert min(map(len, texts)) > 0
    file = pq.ParquetFile(source.train_files[0])
    assert file.metadata.row_group(0).num_rows == 1024
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


# -----------------------------------------------------------------------------
# The local corpus


@pytest.fixture
def small_installation(tmp_path, monkeypatch):
    """A standard library of three packages, so that building takes a second or two."""
    real, small = Path(sysconfig.get_paths()["stdlib"]), tmp_path / "stdlib"
    for name in ("json", "email", "pydoc_data"):
        shutil.copytree(real / name, small / name)
    paths = SimpleNamespace(get_paths=lambda: {"stdlib": str(small)})
    monkeypatch.setattr(local_corpus, "sysconfig", paths)
    monkeypatch.setattr(local_corpus, "PACKAGES", ("optax", "not_installed_anywhere"))
    return small


def test_the_local_corpus_is_built_once_and_the_same_again(small_installation, monkeypatch):
    source = sources.open()
    train, val = list(source.texts("train")), list(source.texts("val"))
    assert len(train) > 300 and len(val) > 2
    assert source.name == "local" and len(source.hash) == 64
    manifest = json.loads((source.train_files[0].parent / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["versions"]["optax"] and manifest["versions"]["not_installed_anywhere"] is None

    monkeypatch.setattr(local_corpus, "PACKAGES", ("rich",))  # as after a later install
    assert sources.open("local") == source
    monkeypatch.setattr(local_corpus, "PACKAGES", ("optax", "not_installed_anywhere"))
    (source.train_files[0].parent / "manifest.json").write_text('{"source": "lo')
    with pytest.raises(UserError, match=r"local is damaged \(manifest\.json cannot be read\): delete this folder, and"):
        sources.open("local")
    shutil.rmtree(source.train_files[0].parent)
    assert sources.open("local").hash == source.hash


def test_validation_text_is_not_in_the_training_text(small_installation):
    source = sources.open("local")

    def paragraphs(split):
        plain = (re.sub(r"\W+", " ", p.lower()).strip() for t in source.texts(split) for p in t.split("\n\n"))
        return [p for p in plain if len(p) >= local_corpus.MIN_PARAGRAPH]

    train, val = paragraphs("train"), paragraphs("val")
    assert len(set(train)) == len(train) and not set(train) & set(val) and val


def test_extras_do_not_change_the_local_corpus():
    """Its packages are those that every installation of the project includes."""
    wanted, core = ["nanochat-jax"], set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name not in core:
            core.add(name)
            lines = [line.partition(";") for line in importlib.metadata.requires(name) or ()]
            wanted += [re.match(r"[\w.-]+", line)[0] for line, _, marker in lines if not marker]
    provides = importlib.metadata.packages_distributions()
    for package in local_corpus.PACKAGES:
        assert core & {name.lower().replace("_", "-") for name in provides[package]}, package


def test_docstrings_of_a_module(tmp_path):
    module = tmp_path / "pets.py"
    long = "Barks at strangers, loudly and for a long time. " * 5
    module.write_text(
        f'''"""Animals that live with us."""
import nonexistent_module
raise SystemExit("parsed, not imported")
class Dog:
    """{long}

        >>> Dog().bark()  # doctest: +SKIP
        <BLANKLINE>
        'wuff'
    """
    def bark(self):
        """Makes a sound."""
if True:
    def cat():
        """Purrs."""
add_newdoc("pets", "fish", """
    Is silent. {long}
    """)
''',
        encoding="utf-8",
    )
    assert ast.parse(module.read_text(encoding="utf-8"))
    documents = dict(local_corpus.module_documents("pets", str(module)))
    assert list(documents) == ["pets.Dog", "pets.fish"], "too little is left for a document of the module itself"
    assert documents["pets.Dog"].startswith("pets.Dog\n\nBarks at strangers")
    assert "Dog().bark()\n" in documents["pets.Dog"] and ">>>" not in documents["pets.Dog"]
    assert "BLANKLINE" not in documents["pets.Dog"] and documents["pets.Dog"].endswith("Dog.bark\n\nMakes a sound.")
    assert "Is silent." in documents["pets.fish"]
    (tmp_path / "old.py").write_text('print "python 2"', encoding="utf-8")
    assert local_corpus.module_documents("old", str(tmp_path / "old.py")) == []


# -----------------------------------------------------------------------------
# Waiting for files


def test_a_shard_that_never_arrives_is_an_error(tmp_path):
    (tmp_path / "old").write_text("")
    os.utime(tmp_path / "old", (1, 1))
    with pytest.raises(UserError, match="missing, and no download is running"):
        hub.wait_for_shard(tmp_path / "shard_00000.parquet", patience=0.1)
    with pytest.raises(UserError, match="missing, and no download is running"):
        hub.wait_for_shard(tmp_path / "nowhere" / "shard_00000.parquet")
    with pytest.raises(UserError, match=r"val_00000\.parquet: this file is gone: put it back"):
        hub.wait_for_shard(tmp_path / "val_00000.parquet")  # at once, although the folder has just changed
