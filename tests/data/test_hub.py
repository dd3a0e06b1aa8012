"""Downloads from a local server that stands in for the hub and fails in every way a network does."""

import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import serving

from nanochat_jax import config, run_log
from nanochat_jax.config import UserError
from nanochat_jax.data import download_estimate, hub, sources, transfer
from scripts import tok_train

VAL = hub.shard_name(1822)
SHARDS = (0, 1, 2, 1822)


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder, rng = tmp_path / "hub", random.Random(0)
    folder.mkdir()
    for i in SHARDS:
        texts = [f"document {i} {j} {rng.randbytes(2000).hex()}" for j in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / hub.shard_name(i), row_group_size=4)
    with serving(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        monkeypatch.setattr(transfer, "PAUSE", 0.01)
        yield server


def data_folder():
    return config.base_dir() / "data" / "fineweb-edu"


def whole(server, *numbers):
    """Whether the shards on disk equal the server's. Asserts that there are no other files besides their hashes."""
    names = {hub.shard_name(i) for i in numbers}
    here = {p.name for p in data_folder().iterdir()}
    assert here - {"manifest.json", "lock"} == names | {f"{name}.sha256" for name in names}
    for name in names:
        data = (data_folder() / name).read_bytes()
        if data != (server.folder / name).read_bytes():
            return False
        hash_line = (data_folder() / f"{name}.sha256").read_text()
        assert hash_line == f"{hashlib.sha256(data).hexdigest()}  {name}\n"  # as sha256sum writes it
    return True


def free_space(monkeypatch, size):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, size))


def run(*args, **env):
    """Runs the command in its own process, because huggingface_hub reads its settings when it is imported."""
    command = [sys.executable, "-m", "nanochat_jax.dataset", *args]
    env = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=config.REPOSITORY)


# -----------------------------------------------------------------------------
# Successful downloads


def test_download_then_open(server):
    done = run("-n", "3", "-w", "2", "--data", "fineweb-edu", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert whole(server, *SHARDS) and server.tokens == {"Bearer hf_secret"}
    source = sources.open("fineweb-edu")
    assert [p.name for p in source.train_files] == [hub.shard_name(i) for i in range(3)]
    assert [t.split()[1:3] for t in source.texts("train")] == [[str(i), str(j)] for i in range(3) for j in range(20)]
    assert [t.split()[1] for t in source.texts("val")] == ["1822"] * 20

    server.requests.clear()
    again = run("-n", "2")
    assert again.returncode == 0 and not server.requests, "existing shards are not requested again"
    assert sources.open("fineweb-edu") == source, "a smaller request takes nothing away"


def test_bytes_that_lie_elsewhere_are_verified_and_the_token_stays_here(server, monkeypatch):
    """As on the hub, which redirects to another host but itself reports the file's size and hash."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(server.folder) as store:
        server.elsewhere = f"http://localhost:{store.server_port}"
        store.faults = {f"GET {hub.shard_name(0)}": ["drop", "wrong", "drop"]}
        hub.download("fineweb-edu", 1)
        assert whole(server, 0, 1822)
        assert server.tokens == {"Bearer hf_secret"} and store.tokens == {None}
        assert {method for method, _ in store.requests} == {"GET"} and store.ranges


def test_offline_mode_is_honoured(server):
    done = run("-n", "3", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and not server.requests
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert run("-n", "3").returncode == 0
    server.requests.clear()
    assert run("-n", "3", HF_HUB_OFFLINE="1").returncode == 0 and not server.requests, "everything is there already"


def test_the_validation_shard_is_asked_for_first_and_is_never_trained_on(server):
    hub.download("fineweb-edu", 2)
    assert server.requests[0] == ("HEAD", VAL)
    source = sources.open("fineweb-edu")
    assert source.val_files[0].name == VAL and VAL not in {p.name for p in source.train_files}


def test_a_download_that_only_begins_says_what_training_waits_for(server):
    hub.download("fineweb-edu", 3, begin=True)
    train, val = hub.shards_of("fineweb-edu")
    assert [path.name for path in train] == [hub.shard_name(i) for i in range(3)]
    assert [path.exists() for path in train] == [True, False, False] and val.exists()
    hub.download("fineweb-edu", 3)
    assert all(path.exists() for path in train)


def test_a_disk_that_is_too_small_is_refused_before_the_shards_are_fetched(server, monkeypatch):
    size = (server.folder / VAL).stat().st_size
    free_space(monkeypatch, int(1.5 * size))
    for begin in (True, False):
        with pytest.raises(
            UserError, match=r"^fineweb-edu: 3 shards .* free in .*data/fineweb-edu: .*NANOCHAT_BASE_DIR"
        ):
            hub.download("fineweb-edu", 3, begin=begin)
    assert {name for _, name in server.requests} == {VAL} and whole(server, 1822)
    assert not (data_folder() / "manifest.json").exists(), "no run waits for shards that were refused"
    assert hub.shards_of("fineweb-edu", 1)[0], "the shards that were here can still be used"
    hub.download("fineweb-edu", 1)
    assert whole(server, 0, 1822), "one shard fits"


def test_an_estimate_reads_a_little_and_keeps_nothing(server, monkeypatch):
    monkeypatch.setattr(server, "pace", 0.02)  # at most 0.2 MB/s
    size = (server.folder / hub.shard_name(0)).stat().st_size
    estimate = functools.partial(download_estimate.estimate, "fineweb-edu", 3, 4, seconds=0.1)
    line = re.fullmatch(
        r"4 shards of fineweb-edu, 0\.0 GB: (\d+)s to (\d+)s \(0 MB/s over one connection, and the download uses 4\)",
        estimate(),
    )
    assert line and 4 * size / 2e5 - 1 < int(line[2]) < 60 and int(line[1]) <= int(line[2]) / 4 + 1
    assert not data_folder().exists() and server.sent[hub.shard_name(1822)] < size, "the connection was closed early"
    with monkeypatch.context() as small:
        free_space(small, size)
        assert "; TOO LITTLE DISK: fineweb-edu: 4 shards of 0 MB need 0.0 GB" in estimate()
    server.missing.add(VAL)
    assert re.match("4 shards of fineweb-edu missing; how long is unknown: .*404", estimate())
    server.missing.clear()
    monkeypatch.setattr(server, "pace", 0.0)
    hub.download("fineweb-edu", 3)
    assert estimate() == "none: all 4 shards of fineweb-edu are here"


def test_progress_tells_files_speed_and_time_left(server, monkeypatch, capsys):
    monkeypatch.setattr("nanochat_jax.progress.PATIENCE", 0.0)
    monkeypatch.setattr("nanochat_jax.progress.BETWEEN_LINES", 0.0)
    for i in range(3):
        texts = [random.Random(j).randbytes(500_000).hex() for j in range(5)]
        pq.write_table(pa.table({"text": texts}), server.folder / hub.shard_name(i))
    server.pace = 0.002
    hub.download("fineweb-edu", 3, workers=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fineweb-edu, MB")]
    assert any(re.search(r": \d+/\d+, [012]/3 files, \d+\.\d MB/s, \d+ s left$", line) for line in lines), lines


# -----------------------------------------------------------------------------
# Faults during the transfer


@pytest.mark.parametrize("fault", [500, 503, 408, 429, "drop", "short", "stall", "silent", "wrong", "other"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_fault_that_passes_is_survived(server, fault, method):
    server.faults = {f"{method} {hub.shard_name(0)}": [fault]}
    hub.download("fineweb-edu", 1)
    assert whole(server, 0, 1822)


def test_what_arrived_before_a_fault_is_not_fetched_again(server):
    name = hub.shard_name(0)
    server.faults = {f"GET {name}": ["drop", "stall", 500, "drop", "short", "drop"]}
    hub.download("fineweb-edu", 1)
    size = (server.folder / name).stat().st_size
    assert whole(server, 0, 1822) and server.sent[name] == size
    starts = [start for n, start in server.ranges if n == name]
    assert starts == sorted(starts)


def test_a_server_without_ranges_sends_the_whole_file(server):
    server.faults = {f"GET {hub.shard_name(0)}": ["drop", "whole"]}
    hub.download("fineweb-edu", 1)
    assert whole(server, 0, 1822)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, "500"),
        (429, "429"),
        ("wrong", "SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        (403, "403"),
        ("other", "got 34 of"),
        ("silent", "timed out"),
    ],
)
def test_a_fault_that_stays_is_the_reason_and_the_rest_arrives(server, fault, words, monkeypatch):
    monkeypatch.setattr(transfer, "LONGEST_PAUSE", 0.1)  # with 429 the server asks for a second
    server.faults = {f"GET {hub.shard_name(1)}": [fault] * 50}
    start, missing = time.monotonic(), f"1 of 3 shards missing; first failure: {hub.shard_name(1)}"
    with pytest.raises(UserError, match=f"{missing}: .*{words}") as caught:
        hub.download("fineweb-edu", 3)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 8
    assert not (data_folder() / hub.shard_name(1)).exists(), "a partial file never has the name of a shard"
    server.faults = {}
    hub.download("fineweb-edu", 3)
    assert whole(server, *SHARDS)


def test_a_failed_shard_is_an_exit_code_and_one_line(server):
    server.missing = {hub.shard_name(1)}
    done = run("-n", "3")
    assert done.returncode == 2 and "1 of 3 shards missing; first failure: shard_00001.parquet" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (data_folder() / hub.shard_name(2)).exists() and not (data_folder() / hub.shard_name(1)).exists()
    server.missing = set()
    assert run("-n", "3").returncode == 0


def test_many_failures_end_the_download_early(server):
    server.missing = {hub.shard_name(i) for i in range(100)}
    with pytest.raises(UserError, match="100 of 100 shards missing"):
        hub.download("fineweb-edu", 100, workers=2)
    assert len(server.requests) < 20


def test_the_servers_wish_to_wait_is_respected(server):
    server.faults = {f"GET {hub.shard_name(0)}": [429]}
    start = time.monotonic()
    hub.download("fineweb-edu", 1)
    assert 1.0 <= time.monotonic() - start < 4.0


def test_a_hub_that_nobody_answers_for_is_one_line_within_seconds(monkeypatch):
    start = time.monotonic()
    done = run("-n", "3", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "fineweb-edu" in done.stderr, done.stderr
    assert time.monotonic() - start < 8


# -----------------------------------------------------------------------------
# Interruptions


def begun(count):
    """Waits until at least `count` bytes of training shards have arrived."""
    deadline = time.time() + 30
    while sum(p.stat().st_size for p in data_folder().glob("shard_0000*.part")) < count:
        assert time.time() < deadline, "nothing arrives"
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_download_goes_on_where_it_was(server, how):
    server.pace = 0.02
    command = [sys.executable, "-m", "nanochat_jax.dataset", "-n", "3"]
    process = subprocess.Popen(command, cwd=config.REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        while not (data_folder() / VAL).exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(UserError, match="another download"):
            hub.download("fineweb-edu", 3)
        begun(100_000)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or "run the command again to resume" in stderr
    assert not (data_folder() / hub.shard_name(0)).exists()
    server.pace = 0
    hub.download("fineweb-edu", 3)
    assert whole(server, *SHARDS)
    sizes = sum((server.folder / hub.shard_name(i)).stat().st_size for i in range(3))
    sent = sum(server.sent[hub.shard_name(i)] for i in range(3))
    assert server.ranges and sent < sizes + 3 * 70_000  # some bytes were still in buffers when it was interrupted


def test_training_text_is_read_while_the_rest_arrives(server):
    server.pace = 0.01
    arriving = threading.Thread(target=hub.download, args=("fineweb-edu", 3, 1))
    arriving.start()
    while not (data_folder() / "manifest.json").exists():
        time.sleep(0.01)
    seen = []
    for text in sources.open("fineweb-edu").texts("train"):
        seen.append((text.split()[1], (data_folder() / hub.shard_name(2)).exists()))
    arriving.join()
    assert [number for number, _ in seen] == [str(i) for i in range(3) for _ in range(20)]
    assert not seen[0][1] and seen[-1][1], "the first were read before the last arrived"


def test_who_waits_for_a_shard_bears_with_a_silent_server(server):
    """While a download is running, waiting goes on even if nothing arrives; without a download, it fails."""
    server.faults = {f"GET {hub.shard_name(0)}": ["silent", "silent"]}
    arriving = threading.Thread(target=hub.download, args=("fineweb-edu", 1))
    arriving.start()
    while not (data_folder() / "manifest.json").exists():
        time.sleep(0.01)
    hub.wait_for_shard(data_folder() / hub.shard_name(0), patience=1.5)
    arriving.join()
    with pytest.raises(UserError, match="no download is running"):
        hub.wait_for_shard(data_folder() / hub.shard_name(1), patience=1.5)


def test_the_tokenizer_is_trained_on_its_own_number_of_shards(server, monkeypatch, capsys):
    """Whatever else has arrived, was requested, or is still arriving."""
    cfg = config.TokTrain(data="fineweb-edu", num_files=2, vocab_size=300)
    hub.download("fineweb-edu", 1)
    arriving = threading.Thread(target=hub.download, args=("fineweb-edu", 3))
    arriving.start()
    tok_train.main(cfg)
    arriving.join()
    folder = config.base_dir() / "tokenizer"
    assert run_log.read(folder)[0]["documents"] == 40
    assert json.loads((folder / "source.json").read_text())["num_files"] == 2
    capsys.readouterr()
    tok_train.main(cfg)
    assert "already" in capsys.readouterr().out
    tok_train.main(dataclasses.replace(cfg, num_files=-1))
    assert run_log.read(folder)[0]["documents"] == 60

    for path in data_folder().iterdir():
        os.utime(path, (0, 0))
    with pytest.raises(UserError, match=r"shard_00003.parquet: missing, .*--num_files=3"):
        tok_train.main(dataclasses.replace(cfg, num_files=4))
    with pytest.raises(UserError, match="--num_files=1823: expected 1 to 1822"):
        tok_train.main(dataclasses.replace(cfg, num_files=1823))


# -----------------------------------------------------------------------------
# Files that exist already


def test_a_broken_file_is_fetched_again(server):
    """Upstream #392: an existing file is not always a good one."""
    hub.download("fineweb-edu", 3)
    truncated, flipped, pinned = (data_folder() / hub.shard_name(i) for i in range(3))
    truncated.write_bytes(truncated.read_bytes()[:5000])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    pinned.touch()
    server.requests.clear()
    hub.download("fineweb-edu", 3)
    assert whole(server, *SHARDS)
    assert {name for method, name in server.requests if method == "GET"} == {hub.shard_name(0), hub.shard_name(1)}


def test_verify_finds_what_changed_without_being_written(server, capsys):
    hub.download("fineweb-edu", 1)
    path = data_folder() / hub.shard_name(0)
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hub.download("fineweb-edu", 1)
    assert not whole(server, 0, 1822)
    hub.download("fineweb-edu", 1, verify=True)
    assert whole(server, 0, 1822) and f"{path} is damaged (SHA-256" in capsys.readouterr().out


def test_files_put_here_by_hand_are_taken_unless_they_are_broken(server):
    data_folder().mkdir(parents=True)
    for i in SHARDS:
        (data_folder() / hub.shard_name(i)).write_bytes((server.folder / hub.shard_name(i)).read_bytes())
    (data_folder() / hub.shard_name(2)).write_bytes(b"an HTML page of a proxy")
    assert VAL not in {path.name for path in sources.open("fineweb-edu").train_files}, "never trained on"
    hub.download("fineweb-edu", 3)
    assert whole(server, *SHARDS) and {name for _, name in server.requests} == {hub.shard_name(2)}


def test_without_a_hash_from_the_server_the_first_download_is_what_later_ones_must_be(server):
    server.hashes = False
    hub.download("fineweb-edu", 1)
    path = data_folder() / hub.shard_name(0)
    path.unlink()
    server.faults = {f"GET {hub.shard_name(0)}": ["wrong"] * 50}
    with pytest.raises(UserError, match=r"expected [0-9a-f]{64} as first recorded \(shard_00000\.parquet\.sha256\)"):
        hub.download("fineweb-edu", 1)
    assert not path.exists()
    server.faults = {f"GET {hub.shard_name(0)}": ["drop", "wrong", "drop"]}
    hub.download("fineweb-edu", 1)
    assert whole(server, 0, 1822)


def test_the_beginning_of_another_version_is_not_continued(server):
    name = hub.shard_name(0)
    server.faults = {f"GET {name}": ["drop"] + [500] * 10}
    with pytest.raises(UserError):
        hub.download("fineweb-edu", 1)
    assert list(data_folder().glob(f"{name}.*.part"))
    pq.write_table(pa.table({"text": ["another", "version"] * 2000}), server.folder / name)
    server.faults = {}
    hub.download("fineweb-edu", 1)
    assert whole(server, 0, 1822) and not [start for n, start in server.ranges if n == name and start > 0][1:]


# -----------------------------------------------------------------------------
# Invalid requests


@pytest.mark.parametrize(("number", "workers"), [(0, 4), (1823, 4), (-2, 4), (8, 0)])
def test_wrong_values(number, workers):
    with pytest.raises(UserError, match=f"-n {number} -w {workers}: expected 1 to 1822 shards"):
        hub.download("fineweb-edu", number, workers)
    with pytest.raises(UserError, match="--data=wikipedia: unknown source"):
        hub.download("wikipedia")


def test_opening_what_was_not_downloaded_names_the_command():
    with pytest.raises(UserError, match=r"run python -m nanochat_jax\.dataset --data climbmix -n 8"):
        sources.open("climbmix")


def test_manifest_records_what_was_asked_for(server):
    hub.download("fineweb-edu", 2)
    manifest = json.loads((data_folder() / "manifest.json").read_text())
    assert manifest == {"source": "fineweb-edu", "repo": "karpathy/fineweb-edu-100b-shuffle", "shards": 2}


@pytest.mark.parametrize("text", ['{"source": "fineweb-edu", "sha', "", "{}", '{"shards": "2"}', '{"shards": 0}'])
def test_a_damaged_manifest_is_not_taken_for_shards_that_were_copied_by_hand(server, text, capsys):
    hub.download("fineweb-edu", 2)
    manifest = data_folder() / "manifest.json"
    manifest.write_text(text)
    fix = r"manifest\.json is damaged, .*: run python -m nanochat_jax.dataset --data fineweb-edu -n N"
    with pytest.raises(UserError, match=fix) as caught:
        sources.open("fineweb-edu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=fix):
        hub.shards_of("fineweb-edu")
    assert [p.name for p in hub.shards_of("fineweb-edu", 1)[0]] == [hub.shard_name(0)], "counted by the user"
    capsys.readouterr()
    hub.download("fineweb-edu", 2)
    assert f"{manifest} is damaged: writing it again, with 2 training shards\n" in capsys.readouterr().out
    assert len(sources.open("fineweb-edu").train_files) == 2
    manifest.unlink()
    assert len(sources.open("fineweb-edu").train_files) == 2, "copied by hand"
