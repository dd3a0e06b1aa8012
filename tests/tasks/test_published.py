"""The word list and the identity conversations of the original: downloaded from a local server that fails as networks
do, or replaced, with a line that says so."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import tasks
from nanochat_jax.config import REPOSITORY
from nanochat_jax.data import transfer
from nanochat_jax.tasks import identity, published, words

WORDS = "".join(f"word{chr(97 + i)}{chr(97 + j)}\r\n" for i in range(26) for j in range(26)).encode()
CONVERSATION = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "nanochat."}]
CONVERSATIONS = (json.dumps(CONVERSATION) + "\n").encode() * 200
CONTENT = {"words_alpha.txt": WORDS, "identity_conversations.jsonl": CONVERSATIONS}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with byte ranges. `faults` lists what goes wrong with the next requests."""

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        server.requests.append((name, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "silent":
            return None
        data = CONTENT[name]
        if fault == "wrong":
            data = b"x" * len(data)
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : (begin + len(data)) // 2 if fault == "truncated" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.faults = [], []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for constant, name in (("WORDS", "words_alpha.txt"), ("IDENTITY", "identity_conversations.jsonl")):
            data = CONTENT[name]
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            file = published.PublishedFile(name, url, hashlib.sha256(data).hexdigest(), len(data))
            monkeypatch.setattr(published, constant, file)
        words._all_words.cache_clear()
        yield server
        server.shutdown()
    words._all_words.cache_clear()


@pytest.fixture
def corpus(own_base_dir):
    """Pretraining text, for words when the word list cannot be had."""
    folder = own_base_dir / "data" / "local"
    folder.mkdir(parents=True)
    text = " ".join(f"local{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26))
    for split in ("train", "val"):
        pq.write_table(pa.table({"text": [text] * 3}), folder / f"{split}_00000.parquet")
    (folder / "manifest.json").write_text(json.dumps({"source": "local", "hash": "0"}), encoding="utf-8")


def load(name: str, task_files: str = "published", **options):
    return tasks.load(name, "train", task_files=task_files, **options)


def test_both_files_are_downloaded_once_and_said(own_base_dir, server, capsys):
    task, bee = load("identity"), load("spellingbee")
    assert len(task) == 200 and task[0]["messages"] == CONVERSATION
    assert {*bee.words, *words.load("test", None, True)} == set(WORDS.decode().split())
    out = capsys.readouterr().out
    folder = own_base_dir / "task_data"
    path = folder / "identity_conversations.jsonl"
    assert f"identity: 200 conversations of {path}, as published for the original nanochat\n" in out
    assert f"words to spell: 676 of {folder / 'words_alpha.txt'}\n" in out
    assert len(load("identity")) == 200 and len(server.requests) == 2
    assert {authorization for _, _, authorization in server.requests} == {None}, "the token is for the hub only"


@pytest.mark.parametrize(
    ("faults", "requests"),
    [([500, 503], 3), (["truncated"], 2), (["truncated", 500, "truncated"], 4), (["wrong"], 2)],
)
def test_failures_are_retried_and_a_partial_file_is_resumed(own_base_dir, server, faults, requests):
    server.faults = list(faults)
    assert len(load("identity")) == 200
    assert (own_base_dir / "task_data" / "identity_conversations.jsonl").read_bytes() == CONVERSATIONS
    assert len(server.requests) == requests
    ranges = [begin for _, begin, _ in server.requests]
    resumed = f"bytes={len(CONVERSATIONS) // 2}-"
    assert (ranges[1] == resumed) == (faults[0] == "truncated") and ranges[0] is None


@pytest.mark.parametrize(
    ("fault", "reason"), [(500, "500"), (404, "404"), ("wrong", "SHA-256"), ("silent", "disconnected")]
)
def test_without_the_published_files_others_are_used_and_a_line_says_so(
    own_base_dir, corpus, server, capsys, fault, reason
):
    server.faults = [fault] * 20
    task, bee = load("identity"), load("simplespelling")
    assert len(task) == 1000 and any("JAX" in str(c) for c in task)
    assert all(word.startswith("local") for word in bee.words)
    out = capsys.readouterr().out
    lines = {line.split(":")[0]: line for line in out.splitlines()}
    for line, file in (
        (lines["identity"], "identity_conversations.jsonl"),
        (lines["words to spell"], "words_alpha.txt"),
    ):
        assert "(download failed on 20" in line and reason in line
        assert f"to try again, delete {own_base_dir / 'task_data' / file}.failed)" in line
    assert not list((own_base_dir / "task_data").glob("*alpha.txt")), "no unverified file is kept"


def test_a_failed_download_is_tried_again_only_when_asked_to(own_base_dir, server, capsys):
    """A run that is resumed must find the conversations that it began with."""
    server.faults = [404]
    assert len(load("identity")) == 1000 and len(server.requests) == 1
    assert len(load("identity")) == 1000 and len(server.requests) == 1
    (own_base_dir / "task_data" / "identity_conversations.jsonl.failed").unlink()
    assert len(load("identity")) == 200 and len(server.requests) == 2


def test_only_task_files_published_downloads(own_base_dir, corpus, server, capsys):
    assert len(load("identity", "generated")) == 1000
    assert all(word.startswith("local") for word in load("spellingbee", "generated").words)
    assert server.requests == []
    out = capsys.readouterr().out
    assert f"{own_base_dir / identity.FILE}, generated (--task_files=generated)\n" in out
    assert "the frequent words of the pretraining text (--task_files=generated)\n" in out
    # What a run of another preset has generated does not replace the published files.
    assert len(load("identity")) == 200 and load("spellingbee").words[0].startswith("word")
    assert len(load("identity", "generated")) == 1000


def test_a_download_for_another_run_does_not_change_the_generated_words(own_base_dir, corpus, server):
    before = load("spellingbee", "generated").words
    assert load("spellingbee").words[0].startswith("word")
    words._all_words.cache_clear()  # as in a new process
    assert load("spellingbee", "generated").words == before and before[0].startswith("local")


def test_files_of_your_own_come_first(own_base_dir, server, tmp_path, capsys):
    own_base_dir.mkdir()
    (own_base_dir / identity.FILE).write_text(json.dumps(CONVERSATION) + "\n", encoding="utf-8")
    assert len(load("identity")) == 1
    data = tmp_path / "data"
    (data / "words").mkdir(parents=True)
    (data / "words" / "words_alpha.txt").write_text("\n".join(f"own{i}" for i in range(99)), encoding="utf-8")
    (data / identity.FILE).write_text((json.dumps(CONVERSATION) + "\n") * 2, encoding="utf-8")
    assert len(load("identity", data_dir=data)) == 2
    assert load("spellingbee", data_dir=data).words[0].startswith("own")
    assert server.requests == []
    assert f"identity: 2 conversations of {data / identity.FILE}\n" in capsys.readouterr().out


def test_processes_that_start_together_download_once(own_base_dir, server):
    code = f"""
from nanochat_jax import tasks
from nanochat_jax.tasks import published
published.IDENTITY = published.{published.IDENTITY!r}
print(len(tasks.load("identity", "train", task_files="published")))
"""
    env = os.environ | {"NANOCHAT_BASE_DIR": str(own_base_dir)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].splitlines()[-1] for process in running] == ["200"] * 3
    assert len(server.requests) == 1


def test_the_pins_are_hashes_and_the_word_list_is_pinned_to_a_commit():
    for file in (published.WORDS, published.IDENTITY):
        assert len(bytes.fromhex(file.sha256)) == 32 and file.url.startswith("https://") and file.size > 2_000_000
        assert file.url.endswith("/" + file.name)
    assert "/master/" not in published.WORDS.url
