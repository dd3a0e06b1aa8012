"""A user's folder: which file serves for what, which documents are held out, and which files can be read."""

import bz2
import gzip
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, sources, text_files, text_folder


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path, texts):
    """Writes documents in the format and the compression that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=4)
        return
    data = "\n\n".join(texts).encode() if ".txt" in name else lines(texts)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda d: pa.Codec("zstd").compress(d, asbytes=True)}
    path.write_bytes(pack.get(Path(name).suffix, bytes)(data))


def numbered(name, count=10):
    return [f"{name} {i}" for i in range(count)]


def texts(source):
    """(sorted training documents, sorted validation documents)."""
    return sorted(source.texts("train")), sorted(source.texts("val"))


# -----------------------------------------------------------------------------
# Roles


@pytest.mark.parametrize(
    ("path", "role"),
    [("train.jsonl", "train"), ("train-00000-of-00002.parquet", "train"), ("a.jsonl", "train"),
     ("VAL.JSONL", "val"), ("my_val.txt", "val"), ("valid.txt.gz", "val"), ("c4-validation.00000.json.gz", "val"),
     ("dev2.jsonl", "val"), ("data/validation/x.parquet", "val"), ("stories.val.jsonl", "val"),
     ("eval.jsonl", "eval"), ("test.jsonl", "test"), ("Test-01.txt", "test"), ("trainTest.txt", "test"),
     ("data/test/part.jsonl", "test"), ("train_test_split/train.jsonl", "train"), ("train/val.jsonl", "val"),
     ("latest.jsonl", "train"), ("contest.txt", "train"), ("device.txt", "train"), ("devices/x.txt", "train"),
     ("medieval.txt", "train"), ("validity.txt", "train"), ("d\u00e9test\u00e9.txt", "train"),
     ("attestation.txt", "train")],
)  # fmt: skip
def test_names_are_believed_word_by_word(path, role):
    assert text_folder.role_of(Path(path)) == role


@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet", "jsonl.gz", "jsonl.zst"])
def test_a_file_named_test_is_never_trained_on(form, tmp_path, capsys):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.{form}", numbered(name))
    source = sources.open(data_dir=tmp_path)
    train, val = texts(source)
    assert "test" not in "".join(train) and "train" not in "".join(val) and train and val
    printed = capsys.readouterr().out
    assert f"  training: train.{form}\n  validation: test.{form}\n" in printed and "not read" not in printed


def test_with_a_validation_file_the_test_file_is_not_read(tmp_path, capsys):
    for name in ("a", "dev", "eval", "more/test-1", "more/test-2"):
        write(tmp_path / f"{name}.jsonl", numbered(name))
    assert texts(sources.open(data_dir=tmp_path)) == (numbered("a"), numbered("dev"))
    why = "held out; the files named val are the validation set"
    assert f"  not read: eval.jsonl, more/test-1.jsonl, more/test-2.jsonl ({why})\n" in capsys.readouterr().out


def test_an_eval_file_is_a_better_validation_set_than_a_test_file(tmp_path, capsys):
    for name in ("a", "eval", "test"):
        write(tmp_path / f"{name}.jsonl", numbered(name))
    assert texts(sources.open(data_dir=tmp_path)) == (numbered("a"), numbered("eval"))
    assert "not read: test.jsonl (held out; the files named eval" in capsys.readouterr().out


def test_a_copy_of_a_training_file_is_not_a_validation_set(tmp_path):
    write(tmp_path / "b.jsonl", numbered("b"))
    write(tmp_path / "a.jsonl", numbered("a"))
    write(tmp_path / "val.jsonl", numbered("a"))
    with pytest.raises(
        UserError, match=rf"^--data_dir={tmp_path}: val\.jsonl is a copy of a\.jsonl: hold out other text"
    ):
        text_folder.roles(tmp_path)
    write(tmp_path / "val.jsonl", numbered("c"))  # of the same size
    assert len(text_folder.roles(tmp_path).val) == 1


def test_a_folder_with_held_out_files_alone_is_refused(tmp_path):
    for name in ("test", "val"):
        write(tmp_path / f"{name}.jsonl", numbered(name))
    with pytest.raises(UserError, match=r"no training files, since a held-out file is never one: val\.jsonl, test\.js"):
        sources.open(data_dir=tmp_path)


def test_parquet_files_with_roles_are_read_in_place_unless_their_names_collide(tmp_path):
    for name in ("train/0000", "validation/0001"):
        write(tmp_path / f"{name}.parquet", numbered(name))
    source = sources.open(data_dir=tmp_path)
    assert source.train_files == (tmp_path / "train" / "0000.parquet",) and source.folder == tmp_path
    before = texts(source)
    (tmp_path / "validation" / "0001.parquet").rename(tmp_path / "validation" / "0000.parquet")
    converted = sources.open(data_dir=tmp_path)
    assert texts(converted) == before and converted.train_files[0].is_relative_to(config.base_dir())


def test_the_hubs_shards_in_a_folder_keep_their_validation_shard(tmp_path):
    for i in (0, 1, 1822):
        write(tmp_path / "copy" / hub.shard_name(i), numbered(f"shard {i}"))
    source = sources.open(data_dir=tmp_path / "copy")
    assert [p.name for p in source.val_files] == ["shard_01822.parquet"] and len(source.train_files) == 2
    assert source.train_files[0].parent == tmp_path / "copy"


def test_another_split_is_another_corpus(tmp_path):
    """A folder that was divided otherwise before is refused when its run resumes, because the hashes differ."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", numbered(name, 300))
    by_hash = sources.open(data_dir=tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "val.jsonl")
    by_name = sources.open(data_dir=tmp_path)
    assert by_hash.hash != by_name.hash and by_hash.val_hash() != by_name.val_hash()


# -----------------------------------------------------------------------------
# 1% by hash


def test_one_percent_is_spread_evenly_over_files_that_are_sorted(tmp_path):
    languages = ("english", "german", "korean")
    write(tmp_path / "all.jsonl", [f"{name} {i}" for name in languages for i in range(2000)])
    train, val = texts(sources.open(data_dir=tmp_path))
    assert len(train) + len(val) == 6000 and not set(train) & set(val)
    per_language = [sum(text.startswith(name) for text in val) for name in languages]
    assert all(8 <= count <= 35 for count in per_language), per_language


def test_the_division_depends_on_the_text_alone(tmp_path):
    documents = numbered("document", 1000)
    write(tmp_path / "one" / "a.jsonl", documents)
    for i in range(4):
        write(tmp_path / "four" / f"{9 - i}.parquet", documents[i::4][::-1] + documents[i::4])  # all twice
    _, val = texts(sources.open(data_dir=tmp_path / "one"))
    train_twice, val_twice = texts(sources.open(data_dir=tmp_path / "four"))
    assert sorted(val * 2) == val_twice and len(train_twice) == 2000 - len(val_twice), "copies are on one side"


def test_the_pieces_of_a_long_document_are_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.parquet, "MAX_CHARS", 10)
    for form in ("jsonl", "parquet"):
        write(tmp_path / form / f"a.{form}", [f"{i:03} abc def {i:03} ghi jkl" for i in range(300)])
        train, val = texts(sources.open(data_dir=tmp_path / form))
        assert max(map(len, train + val)) <= 10
        assert not {t[:3] for t in train if t[:3].isdigit()} & {t[:3] for t in val if t[:3].isdigit()} and val, form


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_small_folder_has_both_sides(count, tmp_path):
    write(tmp_path / "a.jsonl", numbered("x", count))
    train, val = texts(sources.open(data_dir=tmp_path))
    assert sorted(train + val) == sorted(numbered("x", count)) and train and val


def test_copies_of_one_document_cannot_be_divided(tmp_path):
    write(tmp_path / "a.jsonl", ["same", "same ", "same"])
    with pytest.raises(UserError, match="one document cannot be both"):
        sources.open(data_dir=tmp_path)


# -----------------------------------------------------------------------------
# Formats


def test_what_can_be_read_is_read_and_the_rest_is_named_in_one_line(tmp_path, capsys):
    names = ["a.jsonl", "c.jsonl.zst", "d.json.gz", "E.PARQUET", "sub/e.jsonl", "f.txt.gz", "g.ndjson", "h.jsonl.bz2"]
    for name in names:
        write(tmp_path / name, numbered(name))
    array = [{"text": text} for text in numbered("array.json")]
    (tmp_path / "array.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(array, indent=1).encode())
    (tmp_path / "row.json").write_text(json.dumps([{"text": "row.json 0"}]))
    (tmp_path / "config.json").write_text('{\n "layers": 4\n}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    for name in ("table.csv", "notes.md", "README.md", "README.txt", ".hidden.jsonl", "x.parquet.tmp-7", "_SUCCESS"):
        (tmp_path / name).write_text("not text to train on")
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "z.jsonl", ["hidden"])
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "g.ndjson")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write(tmp_path / "val.jsonl", ["validation"])
    train, val = texts(sources.open(data_dir=tmp_path))
    whole = "\n\n".join(numbered("f.txt.gz"))  # short paragraphs are joined
    expected = [t for name in [*names, "array.json"] if name != "f.txt.gz" for t in numbered(name)]
    assert train == sorted([*expected, whole, "row.json 0"]) and val == ["validation"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert line == (
        "  not read: notes.md, table.csv (no known text format); config.json, numbers.json (no text in it); "
        "g.ndjson (another name of a file that is read); a.jsonl.gz (a compressed copy of a file that is read); "
        "README.txt (a readme or licence); gone.jsonl (a broken link)"
    )


def test_a_long_list_of_unread_files_is_cut(tmp_path, capsys):
    write(tmp_path / "a.jsonl", numbered("a"))
    for i in range(40):
        (tmp_path / f"{i:02}.csv").write_text("x")
    sources.open(data_dir=tmp_path)
    assert "not read: 00.csv, 01.csv, 02.csv, 03.csv, 04.csv and 35 more (no known" in capsys.readouterr().out


def test_a_folder_without_text_says_what_it_has(tmp_path):
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(
        UserError, match=r"no files ending in \.parquet.*; not read: table\.csv \(no known text format\)"
    ):
        sources.open(data_dir=tmp_path)


def test_the_base_folder_inside_is_not_read(tmp_path):
    """Otherwise a second command would read what the first converted."""
    write(tmp_path / "a.jsonl", numbered("a", 100))
    first = sources.open(data_dir=tmp_path)
    assert config.base_dir().is_relative_to(tmp_path) and sources.open(data_dir=tmp_path) == first


def test_a_folder_that_cannot_be_read_is_named(monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", name)
        write(folder / "a.jsonl", numbered("a"))
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0)
        root = os.geteuid() == 0
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
                sources.open(data_dir=folder)
        finally:
            if root:
                os.seteuid(0)
        (folder / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.json", b'[{"text": "x"}, 5]', r"a\.json, element 2: expected"),
     ("b.json", b'[{"text": "x"},', "b.json: not JSON"),
     ("c.json", lines(["x"]) + b"{", r"c\.json, line 2: not JSON"),
     ("d.jsonl.zst", b"junk", "d.jsonl.zst: cannot be read"),
     ("e.jsonl.zst", pa.Codec("zstd").compress(lines(["x"] * 999), asbytes=True)[:-4], "e.jsonl.zst: cannot be read")],
)  # fmt: skip
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        sources.open(data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_forms_by_name():
    assert text_files.form(Path("x/A.JSONL.GZ")) == (".jsonl", ".gz")
    assert text_files.form(Path("a.parquet")) == (".parquet", "")
    for name in ("a.parquet.gz", "a.csv", "a.gz", "jsonl", ".jsonl.swp", "a.tar.zst"):
        assert text_files.form(Path(name)) is None, name
