"""Benchmarks: what they measure and write, with real child processes, and every mistake in one line."""

import json
import random
import statistics
import subprocess
import sys
import time

import pytest
import tiny

from nanochat_jax import commandline
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.data import documents, sources
from nanochat_jax.tokenizer import Tokenizer
from scripts.bench import data, decode, serve
from scripts.bench import tokenizer as bench


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1.6 million characters of made-up words in two files."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3000)]
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=500)) + f" {i} é.\n"}) for i in range(550)]
    (folder / "a.jsonl").write_text("\n".join(lines[:300]), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(lines[300:]), encoding="utf-8")
    (folder / "notes.md").write_text("not text to train on")
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "scripts.bench", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fake_python(tmp_path):
    """make(answers) -> the path of a stand-in for a peer's Python: it runs the code `answers`, given a `job`."""

    def make(answers: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport json, sys\njob = json.loads(sys.argv[2])\n{answers}\n")
        path.chmod(0o755)
        return str(path)

    return make


FAKE = """
sys.stdin.read()
if job["job"] == "probe":
    print("a greeting", json.dumps({"python": "3.0", "tools": {"tiktoken": "9.9"}}), sep="\\n")
elif job["job"] == "encode":
    print(json.dumps({"seconds": 2.0, "again": 1.0, "peak": 5000000, "ids": "others"}))
else:
    sys.exit("thread '<unnamed>' panicked")
"""


def test_the_whole_benchmark_against_a_real_second_process(corpus, tmp_path):
    """The peer is tiktoken, in the environment of this Python."""
    flags = [f"--corpus={corpus}", "--vocab_size=600", "--rounds=1", f"--json={tmp_path / 'out.jsonl'}"]
    done = run("tokenizer", *flags, f"--peer-python={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert "rustbpe: skipped, not in" in done.stderr and "round 1 of 1: single, tiktoken" in done.stderr
    *shown, last = done.stdout.splitlines()
    line = json.loads(last)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == last + "\n"
    assert line["bench"] == "tokenizer" and set(line["versions"]) == {"ours", "tiktoken"}
    assert line["cores"] >= 1 and line["cpu"] and "commit" in line["code"] and line["vocab_size"] == 600

    rows = {(row["what"], row["tool"]): row for row in line["results"]}
    assert len(rows) == len(line["results"]) == 1 + 2 * 9
    kinds = {what for what, _ in rows}
    assert {f"encode single texts of {size}" for size in ("100 B", "1 KB", "100 KB")} < kinds
    for what in kinds - {"train"}:
        theirs = rows[what, "tiktoken"]
        assert theirs["mb_per_s"] > 0 and theirs["ours_is"] > 0 and len(theirs["seconds"]) == 1
        compared = ("flat" in what or "lists" in what) and "again" not in what
        assert theirs["same"] == ("yes" if compared else "")
        assert (theirs["peak_mb"] is not None) == compared
        assert any(what in text for text in shown)
    train = rows["train", "ours"]
    assert train["mb_per_s"] == pytest.approx(line["train_bytes"] / train["seconds"][0] / 1e6, rel=1e-3)
    assert line["train_bytes"] > 2.9 * line["unseen_bytes"]


def test_a_peer_that_differs_and_fails_in_part(corpus, fake_python, tmp_path, capsys):
    settings = bench.Settings(str(corpus), fake_python(FAKE), 600, 2, str(tmp_path / "out.jsonl"))
    bench.main(settings)
    printed = capsys.readouterr()
    assert "tiktoken, single: left out, it failed (thread '<unnamed>' panicked)" in printed.err
    assert printed.err.count("left out") == 1  # not tried in the second round
    line = json.loads(printed.out.splitlines()[-1])
    rows = {(row["what"], row["tool"]): row for row in line["results"]}
    warm = rows["encode into lists, after warm-up", "tiktoken"]
    assert (warm["seconds"], warm["peak_mb"], warm["same"]) == ([2.0, 2.0], 5.0, "NO")
    assert warm["mb_per_s"] == pytest.approx(line["unseen_bytes"] / 2e6, rel=1e-3)
    assert ("encode single texts of 1 KB", "ours") in rows and ("encode single texts of 1 KB", "tiktoken") not in rows
    flags = [f"--corpus={corpus}", "--vocab-size=600", "--rounds=1", f"--json={settings.json}"]
    bench.main(commandline.parse(bench.Settings, [*flags, f"--peer-python={settings.peer_python}"]))
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_ours_alone(corpus, fake_python, capsys):
    nothing = fake_python('print(json.dumps({"python": "3.0", "tools": {"ours": "0.2.0"}}))')
    bench.main(bench.Settings(str(corpus), nothing, 300, 1))
    printed = capsys.readouterr()
    assert printed.err.count("skipped, not in") == 3
    assert {row["tool"] for row in json.loads(printed.out.splitlines()[-1])["results"]} == {"ours"}


def test_every_fourth_document_is_unseen(corpus):
    trained_on, unseen = bench._split(str(corpus))
    lines = [line for name in ("a", "b") for line in (corpus / f"{name}.jsonl").read_text("utf-8").splitlines()]
    documents = [json.loads(line)["text"] for line in lines]
    assert unseen == documents[3::4]
    assert sorted(trained_on + unseen) == sorted(documents)
    assert bench._split(str(corpus)) == (trained_on, unseen)


def test_memory_is_what_is_taken_meanwhile():
    program = bench.JOB.read_text(encoding="utf-8").replace('if __name__ == "__main__":', "if False:") + (
        "\nbefore = bytearray(150_000_000); del before\nmemory = Memory(); memory.reset(); low = memory.peak()\n"
        "taken = bytearray(60_000_000); del taken\nprint(low, memory.peak())"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, check=True)
    low, peak = map(int, done.stdout.split())
    if sys.platform == "linux":
        assert low < 10_000_000 < 55_000_000 < peak < 70_000_000


def _python_that(tmp_path, does):
    path = tmp_path / "broken"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def test_mistakes_are_one_line(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "few.txt").write_text("A few words.\n")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "blank.txt").write_text("")

    def complains(words, **settings):
        with pytest.raises(UserError, match=words) as error:
            bench.main(bench.Settings(**({"corpus": str(corpus), "rounds": 1, "vocab_size": 300} | settings)))
        assert "\n" not in str(error.value)

    complains("--corpus is missing: a file or folder of text", corpus="")
    complains("--corpus=.*gone: no such file or folder", corpus=str(tmp_path / "gone"))
    complains("--corpus=.*empty: no files ending in .parquet", corpus=str(tmp_path / "empty"))
    complains("few.txt: 13 characters of text are too few, use about 1,200,000", corpus=str(tmp_path / "few.txt"))
    complains("blank.txt: 0 characters", corpus=str(tmp_path / "blank.txt"))
    complains(r"bad.jsonl, line 1: expected", corpus=str(tmp_path / "bad.jsonl"))
    complains("--vocab_size=256: must be at least 257", vocab_size=256)
    complains("--rounds=0: must be at least 1", rounds=0)
    complains("--json=.*: its folder does not exist", json=str(tmp_path / "gone" / "out.json"))
    complains(r"--vocab_size=200000: the corpus runs out of pairs at [\d,]+ tokens", vocab_size=200_000)
    complains("--peer_python=/gone/python: not a Python that runs .*No such file", peer_python="/gone/python")
    complains("--peer_python=.*: not a Python that runs .*ermission", peer_python=str(tmp_path))
    for does, reason in (("exit 3", "exit code 3, no output"), ("echo sorry >&2; exit 1", "sorry"), ("echo hello", "")):
        complains(f"not a Python that runs .{reason}", peer_python=_python_that(tmp_path, does))


# -----------------------------------------------------------------------------
# Data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base folder with a little text and its tokenizer."""
    base = tmp_path_factory.mktemp("base")
    tiny.make_world(base)
    return base


def test_the_loader_is_measured_from_text_and_from_tokens(world, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    before = sorted(world.rglob("*"))
    flags = ["--total_batch_size=1024", "--max-seq-len=64", f"--json={tmp_path / 'out.jsonl'}"]
    done = run("data", *flags, "--steps=8", "--rounds=2")
    assert done.returncode == 0, done.stderr
    assert "round 2 of 2: from tokens, 8,192 tokens in " in done.stderr
    assert sorted(world.rglob("*")) == before, "its token cache is deleted again: training would read it"
    *shown, last = done.stdout.splitlines()
    line = json.loads(last)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == last + "\n"
    assert (line["bench"], line["packing"], line["vocab_size"], line["files"]) == ("data", "split", 320, 1)
    assert [row["from"] for row in line["results"]] == ["text", "tokens"]
    for row in line["results"]:
        assert (row["batches"], row["tokens"], len(row["seconds"])) == (8, 8192, 2)
        speeds = [row["tokens"] / seconds for seconds in row["seconds"]]
        assert row["tokens_per_s"] == pytest.approx(statistics.median(speeds), rel=1e-3) and row["cores_busy"] > 0
        one, eight = row["against"].values()
        assert one == pytest.approx(row["tokens_per_s"] / 520_000, abs=1e-3)
        assert eight == pytest.approx(one / 8, abs=1e-3)
        assert any(f"{row['tokens_per_s']:,}" in text and f"{one:.2f}x" in text for text in shown)
        name = {"text": "from text", "tokens": "from the token cache"}[row["from"]]
        assert f"{name}: {row['too_short']}: the figure is unreliable" in shown and "is too short" in row["too_short"]

    done = run("data", *flags, "--steps=1000", "--rounds=1", "--packing=stream")
    assert done.returncode == 0, done.stderr
    whole, kept = (json.loads(done.stdout.splitlines()[-1])["results"][0][k] for k in ("batches", "tokens"))
    assert 8 < whole < 100 and (whole - 1) * 1024 < kept <= whole * 1024, "rows without text are not counted"


def test_what_is_counted_is_made_while_the_clock_runs(world, monkeypatch):
    """If the clock started later, batches prefetched before it would make short passes up to four times too fast."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    real, reads = documents.Documents.read, []

    def slow(self, cursor):
        reads.append(time.sleep(0.1))
        return real(self, cursor)

    monkeypatch.setattr(documents.Documents, "read", slow)
    source = sources.open()
    for steps, ended in ((1, False), (1000, True)):
        reads.clear()
        settings = data.Settings(total_batch_size=1024, max_seq_len=64, steps=steps, packing="stream")
        done = data._measure(settings, source, None)
        assert done["ended"] == ended and done["seconds"] >= 0.1 * (len(reads) if ended else 1)
    tokenizer = Tokenizer.load(world / "tokenizer")
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in source.texts("train"))
    assert done["tokens"] == tokens - 1 and len(reads) > 3, "all of the text; only its first token is not predicted"


@pytest.mark.parametrize(
    ("seconds", "batches", "ended", "words"),
    [(0.4, 100, False, "a pass of 0.40 s is too short"), (0.4, 100, True, "a pass of 0.40 s is too short"),
     (2, 39, False, "39 batches are too few where 4 are prefetched"), (2, 40, False, ""), (2, 3, True, "")],
)  # fmt: skip
def test_a_pass_too_short_to_tell_is_named(seconds, batches, ended, words):
    reason = data._too_short({"seconds": seconds, "batches": batches, "ended": ended})
    assert words in reason and bool(words) == bool(reason)


def test_mistakes_about_data_are_one_line(world, own_base_dir, monkeypatch):
    def complains(words, **settings):
        with pytest.raises(UserError, match=words) as error:
            data.main(data.Settings(**({"total_batch_size": 1024, "max_seq_len": 64, "rounds": 1} | settings)))
        assert "\n" not in str(error.value)

    complains("scripts.tok_train")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    for name in ("total_batch_size", "max_seq_len", "steps", "rounds"):
        complains(f"--{name}=0: must be at least 1", **{name: 0})
    complains("--total_batch_size=1000: must be a multiple of --max_seq_len=64", total_batch_size=1000)
    complains("--packing=best: must be split, crop or stream", packing="best")
    complains("--data=wikipedia: unknown source", data="wikipedia")
    complains("--data_dir=/gone: no such folder", data_dir="/gone")
    complains("--json=.*: its folder does not exist", json="/gone/out.json")


# -----------------------------------------------------------------------------
# The command


def test_help_and_names():
    done = run("--help")
    assert done.returncode == 0 and "scripts.bench tokenizer" in done.stdout
    command = [sys.executable, "-X", "importtime", "-m", "scripts.bench", "tokenizer", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m scripts.bench tokenizer")
    assert "--peer_python" in done.stdout and "--config" not in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "pyarrow", "tiktoken", "rustbpe"}
    done = run("data", "--help")
    assert done.returncode == 0 and "--max_seq_len" in done.stdout
    for arguments, words in (([], "must be one of tokenizer, data, decode, serve, train"),
                             (["speed"], "benchmark 'speed'"),
                             (["tokenizer", "--corpus=/gone"], "--corpus=/gone: no such"),
                             (["tokenizer", "--config=cpu"], "--config=cpu")):  # fmt: skip
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# decode

FAKE_HF = """
sys.stdin.read()
if job["job"] == "probe":
    print(json.dumps({"python": "3.0", "version": "transformers 9.9, torch 9.9"}))
elif job["dtype"] == "bfloat16":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
else:
    assert job["job"] == "hf" and job["shape"]["n_layer"] == 1 and (job["prompt"], job["new"]) == (8, 6)
    print(json.dumps({"first": 100.0, "seconds": 150.0}))
"""
TINY = {"device_type": "cpu", "depth": 1, "vocab_size": 320, "prompt": 8, "new": 6, "batches": "2", "chunk": 4}


@pytest.mark.slow
def test_decode_beside_a_peer_that_fails_in_part(fake_python, tmp_path, capsys):
    more = {"dtypes": "float32,bfloat16", "rounds": 1, "peer": "hf", "peer_python": fake_python(FAKE_HF)}
    decode.main(decode.Settings(**TINY, **more, json=str(tmp_path / "out.jsonl")))
    printed = capsys.readouterr()
    assert "hf, batch 2, bfloat16: left out, it failed (torch.OutOfMemoryError: CUDA out of memory)" in printed.err
    line = json.loads(printed.out.splitlines()[-1])
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == line
    assert line["bench"] == "decode" and line["versions"]["hf"] == "transformers 9.9, torch 9.9"
    rows = {(row["tool"], row["dtype"]): row for row in line["results"]}
    assert len(rows) == len(line["results"]) == 3
    theirs, ours = rows["hf", "float32"], [rows["ours", dtype] for dtype in ("float32", "bfloat16")]
    assert (theirs["first_token_s"], theirs["token_s"], theirs["tokens_per_s"]) == (100, 10, 0.2)
    assert [row["best"] for row in ours].count(True) == 1 and theirs["best"]
    assert theirs["ours_is"] == pytest.approx(max(row["tokens_per_s"] for row in ours) / 0.2, rel=1e-3)
    for row in ours:
        (first, seconds), *_ = row["runs"]
        assert 0 < first < seconds and row["token_s"] == pytest.approx((seconds - first) / 5, rel=1e-2)
        # One layer of width 128, the head, and the cache of two rows, 11 tokens each on average, in float32 on a CPU.
        size = 4 if row["dtype"] == "float32" else 2
        needed = (12 * 128**2 + 320 * 128) * size + 2 * 128 * 2 * 11 * 4
        assert row["gb_per_s"] == pytest.approx(needed / row["token_s"] / 1e9, abs=2e-3)
        assert row["bandwidth"] is None  # that of a CPU is unknown
    assert "| n/a |" in " ".join(printed.out.split())


def test_the_share_of_the_bandwidth_and_the_best_dtype():
    cfg = decode.Settings(new=11)
    runs = [{"first": 1.0, "seconds": 1.0 + s, "bytes": 4e9} for s in (0.1, 0.2, 0.5)]
    slow = decode._row((8, "ours", "float32"), runs, cfg, 1e12)
    assert (slow["token_s"], slow["tokens_per_s"], slow["bandwidth"], slow["gb_per_s"]) == (0.02, 400, 0.2, 200)
    fast = decode._row((8, "ours", "bfloat16"), runs[:1], cfg, None)
    other = decode._row((8, "hf", "float32"), [{"first": 1.0, "seconds": 2.0}], cfg, 1e12)
    decode._compare([slow, fast, other])
    assert [row["best"] for row in (slow, fast, other)] == [False, True, True]
    assert [row["ours_is"] for row in (slow, fast, other)] == [None, None, 10] and other["bandwidth"] is None


def test_decode_skips_a_peer_that_is_not_there_and_knows_its_defaults(fake_python, capsys, monkeypatch):
    missing = 'print(json.dumps({"python": "3.0", "missing": "ModuleNotFoundError: No module named \'torch\'"}))'
    device = {"device": "X1", "platform": "gpu", "bandwidth": 1e12, "version": "9"}
    asked, real = [], decode.measuring.run

    def run(python, script, job, ours=False):
        if job["job"] in ("probe", "device"):
            return device if job["job"] == "device" else real(python, script, job)
        asked.append((job["batch"], job["dtype"], job["shape"]["n_layer"], job["prompt"], job["new"]))
        return {"first": 1.0, "seconds": 2.0, "bytes": 1e9}

    monkeypatch.setattr(decode.measuring, "run", run)
    decode.main(decode.Settings(rounds=1, peer="hf", peer_python=fake_python(missing)))
    assert capsys.readouterr().err.count("hf: skipped") == 1
    assert asked == [(batch, "bfloat16", 20, 1792, 256) for batch in (1, 8, 32, 128)]
    asked.clear()
    device["platform"] = "cpu"
    decode.main(decode.Settings(rounds=1))
    assert asked == [(b, dtype, 4, 256, 256) for b in (1, 8, 32) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("change", "words"), [
    ({"new": 1}, "--new=1: must be at least 2"), ({"prompt": -1}, "--prompt=-1"), ({"chunk": 0}, "--chunk=0"),
    ({"batches": "1,x"}, "--batches=1,x: must be positive"), ({"batches": "0"}, "--batches=0"),
    ({"dtypes": "int8"}, "--dtypes=int8: must be float32 or bfloat16"), ({"peer": "vllm"}, "--peer=vllm: must be hf"),
    ({"peer_python": "/x"}, "--peer_python needs --peer=hf"), ({"json": "/gone/x"}, "--json=/gone/x: its folder"),
])  # fmt: skip
def test_decodes_mistakes_are_one_line(change, words):
    with pytest.raises(UserError, match=words):
        decode.main(decode.Settings(**change))


# -----------------------------------------------------------------------------
# serve


@pytest.mark.slow
def test_serve_measures_a_real_server(tmp_path, capsys):
    preset = tmp_path / "tiny.toml"
    preset.write_text("depth = 1\naspect_ratio = 16\nhead_dim = 16\nmax_seq_len = 64\n[tok]\nvocab_size = 320\n")
    sizes = {"clients": 3, "requests": 2, "prompt": 5, "new": 12, "rounds": 1}
    serve.main(serve.Settings(str(preset), **sizes, device_type="cpu"))
    shown, line = capsys.readouterr().out.rsplit("\n\n", 1)
    line = json.loads(line)
    assert line["bench"] == "serve" and {name: line[name] for name in sizes} == sizes
    assert line["runs"][0][1] == line["engine_runs"][0][1] == 3 * 2 * 12  # no answer ended early
    assert line["share"] == pytest.approx(line["server_tokens_per_s"] / line["engine_tokens_per_s"], rel=1e-2)
    assert 0 < line["first_token_p50_s"] <= line["first_token_p95_s"] <= line["runs"][0][0]
    assert line["gap_s"] > 0 and 0 < line["gap_compiling_s"] < line["compiling_s"]
    assert "share of the engine's (the goal is 80%)" in shown and "95th percentile" in shown
    assert "while another client's first top-p answer is compiled" in shown


def test_serves_percentiles_and_mistakes(tmp_path):
    run = {"seconds": 2.0, "tokens": 300, "first": [i / 100 for i in range(100)]}
    run |= {"gap": 0.01, "gap_compiling": 0.04, "compiling": 7.0}
    result = serve._result([run], [run | {"seconds": 1.0}])
    assert (result["server_tokens_per_s"], result["share"]) == (150, 0.5)
    assert (result["first_token_p50_s"], result["first_token_p95_s"]) == (0.5, 0.95)
    assert (result["gap_s"], result["gap_compiling_s"], result["compiling_s"]) == (0.01, 0.04, 7)
    for change, words in (({"clients": 0}, "--clients=0: must"), ({"preset": "gone"}, "--preset=gone: no such preset"),
                          ({"new": 200, "prompt": 100}, "the context of cpu holds 256 tokens"),
                          ({"json": str(tmp_path / "a" / "b")}, "its folder does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            serve.main(serve.Settings(**change))
