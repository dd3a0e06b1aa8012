"""Where text comes from: converted folders, the local corpus, and downloads from a hub of our own on loopback."""

import ast
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import config, dataset, docstrings
from nanochat_jax.config import UserError


def write_jsonl(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: texts}), path, row_group_size=4)


# -----------------------------------------------------------------------------
# Folders


def test_a_folder_of_jsonl_is_converted_once_and_its_last_file_is_the_validation_set(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(20)] + [""])
    write_jsonl(tmp_path / "b.jsonl.gz", [f"b{i} \u00e9" for i in range(10)])
    (tmp_path / "c.txt").write_text("one paragraph\n\nanother \u00fc", encoding="utf-8")
    source = dataset.open(data_dir=tmp_path)
    assert sorted(source.texts("train")) == sorted([f"a{i}" for i in range(20)] + [f"b{i} \u00e9" for i in range(10)])
    assert list(source.texts("val")) == ["one paragraph\n\nanother \u00fc"]
    assert list(source.texts("train")) != sorted(source.texts("train")), "files are mixed"
    assert source.train_files[0].is_relative_to(config.base_dir() / "data")

    capsys.readouterr()
    assert dataset.open(data_dir=tmp_path) == source and not capsys.readouterr().out, "not converted twice"
    write_jsonl(tmp_path / "a.jsonl", ["changed"])
    assert dataset.open(data_dir=tmp_path).hash != source.hash


def test_a_single_file_gives_its_last_hundredth_to_validation(tmp_path):
    write_jsonl(tmp_path / "only.jsonl", [str(i) for i in range(500)])
    source = dataset.open(data_dir=tmp_path)
    assert list(source.texts("val")) == [str(i) for i in range(495, 500)]
    assert sorted(map(int, source.texts("train"))) == list(range(495))


def test_parquet_files_are_read_in_place(tmp_path):
    for name in "cab":
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(10)])
    source = dataset.open(data_dir=tmp_path)
    assert [p.name for p in source.train_files] == ["a.parquet", "b.parquet"]
    assert [p.name for p in source.val_files] == ["c.parquet"]
    assert source.train_files[0].parent == tmp_path
    assert list(source.texts("train")) == [f"{n}{i}" for n in "ab" for i in range(10)]


def test_a_large_text_file_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "word " * 100 for i in range(100)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    source = dataset.open(data_dir=tmp_path)
    documents = [*source.texts("train"), *source.texts("val")]
    assert sorted(p for d in documents for p in d.split("\n\n")) == sorted(paragraphs)
    assert len(documents) > 3


BAD = {
    "broken.parquet": (b"not parquet at all", "broken.parquet: not a readable parquet file"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text": \n', "broken.jsonl, line 2: not JSON"),
    "other.jsonl": (b'{"txt": "hello"}\n', 'other.jsonl, line 1: expected {"text": "..."}'),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl, line 1"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "latin.txt: cannot be read"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl: cannot be read"),
    "broken.jsonl.gz": (b"\x1f\x8b not gzip", "broken.jsonl.gz: cannot be read"),
    "empty.txt": (b"", "empty.txt: no documents"),
    "empty.jsonl": (b"\n\n", "empty.jsonl: no documents"),
    "one.txt": (b"one document", "one.txt: one document cannot be both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_nothing_half_made_is_left(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        dataset.open(data_dir=tmp_path / "in")
    assert "\n" not in str(caught.value)
    assert not list(config.base_dir().glob("data/*"))


def test_truncated_gzip_is_named(tmp_path):
    write_jsonl(tmp_path / "cut.jsonl.gz", [str(i) for i in range(1000)])
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        dataset.open(data_dir=tmp_path)


def test_a_missing_column_is_named(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", ["x"], column="content")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text', it has content"):
        dataset.open(data_dir=tmp_path)


def test_folders_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        dataset.open(data_dir=tmp_path / "nowhere")
    with pytest.raises(UserError, match="no files ending in"):
        dataset.open(data_dir=tmp_path)
    with pytest.raises(UserError, match="--data=wikipedia: unknown source, expected fineweb-edu, climbmix or local"):
        dataset.open("wikipedia")


def test_the_tokenizers_source_is_the_default(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    record = config.base_dir() / "tokenizer" / "source.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"source": None, "data_dir": str(tmp_path)}), encoding="utf-8")
    assert dataset.open().name == tmp_path.name


def test_real_text(data_dir):
    source = dataset.open(data_dir=data_dir / "pretrain")
    texts = list(source.texts("train"))
    assert len(texts) == 3192 + 141 + 618 + 299 and len(list(source.texts("val"))) == 2335
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
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(small)})
    monkeypatch.setattr(dataset, "PACKAGES", ("optax", "not_installed_anywhere"))
    return small


def test_the_local_corpus_is_built_once_and_the_same_again(small_installation, monkeypatch):
    source = dataset.open()
    train, val = list(source.texts("train")), list(source.texts("val"))
    assert len(train) > 300 and len(val) > 2
    assert source.name == "local" and len(source.hash) == 64
    manifest = json.loads((source.train_files[0].parent / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["versions"]["optax"] and manifest["versions"]["not_installed_anywhere"] is None

    monkeypatch.setattr(dataset, "PACKAGES", ("rich",))  # an install later on
    assert dataset.open("local") == source
    monkeypatch.setattr(dataset, "PACKAGES", ("optax", "not_installed_anywhere"))
    shutil.rmtree(source.train_files[0].parent)
    assert dataset.open("local").hash == source.hash


def test_validation_text_is_not_in_the_training_text(small_installation):
    source = dataset.open("local")

    def paragraphs(split):
        plain = (re.sub(r"\W+", " ", p.lower()).strip() for t in source.texts(split) for p in t.split("\n\n"))
        return [p for p in plain if len(p) >= docstrings.MIN_PARAGRAPH]

    train, val = paragraphs("train"), paragraphs("val")
    assert len(set(train)) == len(train) and not set(train) & set(val) and val


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
    found = dict(docstrings.documents("pets", str(module)))
    assert list(found) == ["pets.Dog", "pets.fish"], "too little is left for a document of the module"
    assert found["pets.Dog"].startswith("pets.Dog\n\nBarks at strangers")
    assert "Dog().bark()\n" in found["pets.Dog"] and ">>>" not in found["pets.Dog"]
    assert "BLANKLINE" not in found["pets.Dog"] and found["pets.Dog"].endswith("Dog.bark\n\nMakes a sound.")
    assert "Is silent." in found["pets.fish"]
    (tmp_path / "old.py").write_text('print "python 2"', encoding="utf-8")
    assert docstrings.documents("old", str(tmp_path / "old.py")) == []


# -----------------------------------------------------------------------------
# The hub


class Hub(ThreadingHTTPServer):
    """Serves a few small shards as the hub does: a HEAD for the metadata, a GET for the bytes, with ranges."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.requests, self.broken, self.hiccups = folder, [], set(), 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        self.server.requests.append((self.command, name))
        if body and self.server.hiccups:
            self.server.hiccups -= 1
            return self.reply(500, b"")
        path = self.server.folder / name
        if name in self.server.broken or "/resolve/" not in self.path or not path.exists():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "") if body else ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], headers)
        self.reply(200, data, headers, body)

    def reply(self, status, data, headers=None, body=True):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for i in (0, 1, 2, 1822):
        write_parquet(folder / f"shard_{i:05d}.parquet", [f"document {i} {j}" for j in range(10)])
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(*args, endpoint, **env):
    """huggingface_hub reads its settings at import, so the download runs in a process of its own."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    command = [sys.executable, "-m", "nanochat_jax.dataset", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=config.REPOSITORY)


def test_download_then_open(hub):
    done = run("-n", "3", "-w", "2", "--data", "fineweb-edu", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    source = dataset.open("fineweb-edu")
    assert [p.name for p in source.train_files] == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert list(source.texts("train")) == [f"document {i} {j}" for i in range(3) for j in range(10)]
    assert list(source.texts("val")) == [f"document 1822 {j}" for j in range(10)]

    hub.requests.clear()
    again = run("-n", "2", endpoint=hub.url)
    assert again.returncode == 0 and not hub.requests, "what is there is not asked for again"
    assert dataset.open("fineweb-edu") == source, "a smaller request takes nothing away"


def test_a_failed_shard_is_an_exit_code_and_the_rest_arrives(hub):
    hub.broken = {"shard_00001.parquet"}
    done = run("-n", "3", endpoint=hub.url)
    assert done.returncode == 2 and "1 of 3 shards missing, the first because shard_00001.parquet" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    folder = config.base_dir() / "data" / "fineweb-edu"
    assert (folder / "shard_00002.parquet").exists() and not (folder / "shard_00001.parquet").exists()
    hub.broken = set()
    assert run("-n", "3", endpoint=hub.url).returncode == 0


def test_a_hiccup_is_retried(hub):
    hub.hiccups = 1
    assert run("-n", "1", endpoint=hub.url).returncode == 0
    assert dataset.open("fineweb-edu").train_files


@pytest.mark.slow  # huggingface_hub retries for 23 s
def test_an_unreachable_hub_is_one_line_and_soon(tmp_path):
    start = time.time()
    done = run("-n", "3", endpoint="http://127.0.0.1:9")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "fineweb-edu" in done.stderr, done.stderr
    assert time.time() - start < 60


def test_offline_mode_is_honoured(hub):
    done = run("-n", "3", endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and not hub.requests
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("args", [("-n", "0"), ("-n", "1823"), ("-w", "0"), ("--data", "wikipedia")])
def test_wrong_values(args):
    done = run(*args, endpoint="http://127.0.0.1:9")
    assert done.returncode == 2 and args[1] in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_opening_what_was_not_downloaded_names_the_command():
    with pytest.raises(UserError, match=r"run python -m nanochat_jax\.dataset --data climbmix -n 8"):
        dataset.open("climbmix")


def test_a_shard_that_never_arrives_is_an_error(tmp_path):
    with pytest.raises(UserError, match="missing, and no download is running"):
        dataset.wait_for(tmp_path / "shard_00000.parquet", patience=0.1)
