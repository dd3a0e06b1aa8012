"""The benchmark of the training step: a real tiny step, what is derived from the times, peers, and every mistake."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import pytest
import tiny

from nanochat_jax import commandline
from nanochat_jax.config import REPOSITORY, GPTConfig, UserError
from scripts.bench import train, train_job

TINY = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, vocab_size=64, sequence_len=8)
FLAGS = [
    "--device_type=cpu", "--depth=1", "--aspect_ratio=16", "--head_dim=8", "--device_batch_size=2", "--max_seq_len=8",
    "--vocab_size=64", "--steps=2", "--rounds=2",
]  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])  # restored afterwards
    return {
        "shape": dataclasses.asdict(TINY), "rows": 2, "dtype": "float32", "flags": {}, "device_type": "cpu",
        "cache": str(tmp_path / "cache"), "steps": 2, "repeats": 1, "profile": str(tmp_path / "traces"),
    }  # fmt: skip


# -----------------------------------------------------------------------------
# Our step


def test_a_real_step_is_measured_and_traced_with_the_names_of_its_scopes(job, tmp_path):
    run = train_job.ours(job)
    assert len(run["steps"]) == 2 and min(run["steps"]) > 0 and run["first"] > run["compile"] > 0
    assert set(run["programs"]) == {"forward", "loss", "gradients", "step"} and min(run["programs"].values()) > 0
    assert run["communication"] == 0 and run["attention"] == "xla"
    assert run["peak"] > 0 and run["step_bytes"] > 12 * TINY.num_params  # weights and two moments or momentum
    assert 0 < run["loss"] < 20

    assert list((tmp_path / "traces").rglob("plugins/profile/*/*.xplane.pb")), "XProf opens this"
    events = json.loads(gzip.decompress((tmp_path / "traces" / "trace.json.gz").read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    for scope in ("jvp(embedding)", "jvp(block0)/qkv", "jvp(block0)/attention", "transpose(jvp(block0))/mlp", "loss",
                  "gradient_norm", "optimizer/muon", "optimizer/adamw", "update_weights"):  # fmt: skip
        assert any(scope in name for name in names), scope
    assert "step" in names


def test_what_does_not_fit_is_refused_before_it_is_tried(job, monkeypatch):
    monkeypatch.setattr(train_job, "_status", lambda path, name: 16 * TINY.num_params)
    refused = train_job.ours(job)["refused"]
    assert refused.startswith("2 rows of 8 tokens do not fit: a step needs ")
    assert refused.endswith("GiB are free: lower --device_batch_size (now 2)")
    job["shape"]["n_layer"] = 20_000  # would take hours to compile
    assert train_job.ours(job | {"rows": 1})["refused"].endswith("lower --depth (now 20000) or --vocab_size (now 64)")


@pytest.mark.slow
def test_two_devices_two_dtypes_and_both_caches(tmp_path):
    """Real child processes; the second round finds the compilation cache filled."""
    command = [sys.executable, "-m", "scripts.bench", "train", *FLAGS, f"--json={tmp_path / 'out.jsonl'}"]
    environment = os.environ | {"XLA_FLAGS": tiny.xla_flags(2)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert done.stdout.splitlines()[-1] == json.dumps(line)
    assert (line["bench"], line["devices"], line["shard"]) == ("train", 2, "optimizer")
    assert [row["dtype"] for row in line["results"]] == ["float32", "bfloat16"]
    for row in line["results"]:
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 8 / row["step_s"], rel=1e-3)
        assert row["parts_s"]["communication"] > 0 and sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert row["first_step_warm_s"] > 0 and row["compile_warm_s"] > 0 and len(row["runs"]) == 2


# -----------------------------------------------------------------------------
# What is derived


def _ran(**changes):
    programs = {"forward": 0.1, "loss": 0.15, "gradients": 0.4, "step": 0.6}
    run = {"first": 9.0, "compile": 5.0, "steps": [0.8, 0.64, 0.6], "programs": programs, "communication": 0.05}
    return run | {"peak": 2e9, "loss": 3.0, "attention": "xla"} | changes


@pytest.fixture
def measured(monkeypatch):
    """main(*flags) -> (the line of JSON, the jobs), with made-up measurements instead of child processes."""
    device = {"device": "X1", "platform": "cpu", "devices": 1, "peak": 1e9, "version": "9"}
    jobs, answers = [], {}

    def run(python, script, job, ours=False):
        if job["job"] == "device":
            return device
        if job["job"] == "probe":
            return answers.get("probe", {"python": "3", "torch": "9.9", "transformers": "5.5", "missing": {}})
        jobs.append(job)
        answer = answers.get((job["job"], job["dtype"]), _ran())
        if isinstance(answer, Exception):
            raise answer
        return answer | {"first": 9.0 if len(jobs) == 1 else 3.0}

    monkeypatch.setattr(train.measuring, "run", run)

    def main(*flags):
        jobs.clear()
        train.main(commandline.parse(train.Settings, list(flags)))
        return jobs

    main.device, main.answers = device, answers
    return main


def test_the_parts_add_up_and_the_figures_follow_from_the_times(measured, capsys):
    measured(*FLAGS, "--dtypes=float32")
    shown, line = capsys.readouterr().out.rsplit("\n\n", 1)
    (row,) = json.loads(line)["results"]
    assert (row["step_s"], row["tokens_per_s"], row["fastest_s"], row["slowest_s"]) == (0.64, 25, 0.6, 0.8)
    assert row["parts_s"] == pytest.approx(
        {"forward": 0.1, "loss": 0.05, "backward": 0.25, "optimizer": 0.15, "communication": 0.05, "host": 0.04}
    )
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert (row["first_step_cold_s"], row["first_step_warm_s"], row["peak_mb"]) == (9, 3, 2000)
    flops = 6 * (12 * 16**2 + 64 * 16) + 12 * 16 * 8  # the matrices and the head; attention with 8 keys a query
    assert row["mfu"] == pytest.approx(25 * flops / 1e9, abs=1e-4)
    assert row["mfu_causal"] == pytest.approx(25 * (flops - 12 * 16 * 3.5) / 1e9, abs=1e-4)  # 4.5 keys a query
    for words in ("20 to 27", "9.0 s", "3.0 s", "250.0 ms 39%", "2,000"):
        assert words in shown, words


def test_windows_count_in_the_causal_average():
    model_cfg = dataclasses.replace(TINY, n_layer=2, sequence_len=512, window_pattern="SL")
    keys = sum(min(p, 128) + 1 for p in range(512)) / 512 + 513 / 2
    whole = model_cfg.flops_per_token - 12 * 16 * (128 + 512)
    assert train.causal_flops_per_token(model_cfg) == pytest.approx(whole + 12 * 16 * keys)


@pytest.mark.parametrize(("flags", "platform", "shapes"), [
    ([], "cpu", [(4, 512, 32768, 4, 256), (16, 256, 4096, 4, 256)]),
    ([], "gpu", [(32, 2048, 65536, 20, 1280)]),
    (["--max_seq_len=128", "--depth=2"], "cpu", [(4, 128, 32768, 2, 128)]),
    (["--config=cpu"], "cpu", [(8, 256, 4096, 4, 256)]),
    (["--config=d20"], "gpu", [(32, 2048, 65536, 20, 1280)]),
    (["--config=d20", "--depth=12", "--device_batch_size=3"], "gpu", [(3, 2048, 65536, 12, 768)]),
])  # fmt: skip
def test_the_shape_comes_from_flags_then_the_preset_then_the_platform(measured, flags, platform, shapes):
    measured.device["platform"] = platform
    jobs = measured(*flags, "--rounds=1")
    dtypes = ["bfloat16"] if platform == "gpu" else ["float32", "bfloat16"]
    assert [job["dtype"] for job in jobs] == dtypes * len(shapes)
    found = [(job["rows"], *(job["shape"][n] for n in ("sequence_len", "vocab_size", "n_layer", "n_embd")))
             for job in jobs[:: len(dtypes)]]  # fmt: skip
    assert found == shapes


# -----------------------------------------------------------------------------
# Peers


def test_peers_are_measured_in_turn_and_compared_dtype_by_dtype(measured, tmp_path, capsys):
    folders = []
    for name, files in (("a", ("gpt", "muon", "adamw")), ("b", ("gpt", "optim"))):
        (tmp_path / name / "nanochat").mkdir(parents=True)
        folders.append(str(tmp_path / name))
        for file in files:
            (tmp_path / name / "nanochat" / f"{file}.py").touch()
    programs = {"loss": 0.2, "gradients": 0.5, "step": 0.7}
    measured.answers["hf", "float32"] = _ran(steps=[0.32], programs=programs, communication=0.0)
    measured.answers["hf", "bfloat16"] = train.measuring.JobFailed("CUDA out of memory")
    measured.answers["ours", "bfloat16"] = _ran(steps=[0.16])
    jobs = measured(*FLAGS, "--peer=hf,nanochat", f"--peer_dir={','.join(folders)}")
    assert [(job["job"], job["dtype"]) for job in jobs[:4]] == [
        ("ours", "float32"), ("hf", "float32"), ("nanochat", "float32"), ("nanochat", "float32")
    ]  # fmt: skip
    assert [job["folder"] for job in jobs if job["job"] == "nanochat"][:2] == folders
    assert len({job["cache"] for job in jobs}) == len({(j["job"], j.get("folder"), j["dtype"]) for j in jobs})
    printed = capsys.readouterr()
    assert printed.err.count("bfloat16, hf: left out, it failed (CUDA out of memory)") == 1
    line = json.loads(printed.out.splitlines()[-1])
    assert line["versions"]["hf"] == "transformers 5.5, torch 9.9"
    rows = {(row["tool"], row["dtype"]): row for row in line["results"]}
    assert set(rows) == {(tool, dtype) for tool in ("ours", "hf", "nanochat classic", "nanochat modern")
                         for dtype in train.DTYPES} - {("hf", "bfloat16")}  # fmt: skip
    theirs = rows["hf", "float32"]
    assert (theirs["ours_is"], rows["ours", "float32"]["ours_is"]) == (0.5, None)
    assert theirs["parts_s"] == pytest.approx(
        {"forward": 0.2, "loss": None, "backward": 0.3, "optimizer": 0.2, "communication": 0, "host": -0.38}
    )
    best = next(one for one in line["best"] if one["tool"] == "hf")
    assert (best["dtype"], best["ours_dtype"], best["ours_is"]) == ("float32", "bfloat16", 2)
    assert "ours in bfloat16 is 2.00x hf in float32" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", train.DTYPES)
def test_a_real_step_of_transformers(job, dtype):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = job | {"job": "hf", "platform": "cpu", "dtype": dtype}
    run = train.measuring.run(sys.executable, train.PEER_JOB, theirs)
    assert len(run["steps"]) == 2 and run["programs"]["loss"] < run["programs"]["gradients"] < run["programs"]["step"]
    assert run["first"] > 0 and run["peak"] > 0 and 0 < run["loss"] < 20


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(("flags", "words"), [
    (["--steps=0"], "--steps=0: must be at least 1"),
    (["--dtypes=int8"], "--dtypes=int8: must be float32 or bfloat16"),
    (["--peer=vllm"], "--peer=vllm: must be hf or nanochat"),
    (["--peer_python=/x"], "--peer_python=/x needs --peer=hf or --peer=nanochat"),
    (["--peer=hf", "--peer_dir=/x"], "--peer_dir=/x needs --peer=nanochat"),
    (["--peer=nanochat"], "--peer=nanochat needs --peer_dir: 'git clone https://github.com/karpathy/nanochat'"),
    (["--peer=nanochat", "--peer_dir=/gone"], "--peer_dir=/gone: no checkout of karpathy/nanochat"),
    (["--head_dim=7"], "--head_dim=7: must be even"),
    (["--depth=2", "--n_kv_head=3"], "--n_kv_head=3 does not divide"),
    (["--window_pattern=XL"], "window pattern 'XL'"),
    (["--config=d21"], "--config=d21: no such preset"),
    (["--profile=README.md"], "--profile=README.md: is a file, give a folder"),
    (["--json=/gone/x"], "--json=/gone/x: its folder does not exist"),
])  # fmt: skip
def test_mistakes_are_one_line(measured, monkeypatch, flags, words):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError) as error:
        measured(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_peers_that_cannot_be_measured_are_refused_with_the_fix(measured):
    missing = {"torch": "ModuleNotFoundError: No module named 'torch'", "transformers": "ModuleNotFoundError"}
    measured.answers["probe"] = {"python": "3", "missing": missing}
    with pytest.raises(UserError, match=r"has no torch that works .*No module named 'torch'.*pip install torch .*use "):
        measured("--peer=hf", "--peer_python=/python")
    measured.answers["probe"] = {"python": "3", "torch": "9.9", "missing": {"transformers": "ImportError: too old"}}
    with pytest.raises(UserError, match=r"--peer=hf: /python has no transformers that works .ImportError: too old"):
        measured("--peer=hf", "--peer_python=/python")
    measured.device["devices"] = 2
    with pytest.raises(UserError, match="measured on one device, and JAX sees 2: set CUDA_VISIBLE_DEVICES=0"):
        measured("--peer=hf", "--peer_python=/python")


def test_our_own_step_must_work(measured):
    measured.answers["ours", "float32"] = train.measuring.JobFailed("exit code -9, no output")
    with pytest.raises(UserError, match=r"float32, ours failed .exit code -9.*lower --device_batch_size .now 2"):
        measured(*FLAGS)
    measured.answers["ours", "float32"] = {"refused": "2 rows do not fit"}
    with pytest.raises(UserError, match="float32, ours: 2 rows do not fit"):
        measured(*FLAGS)
