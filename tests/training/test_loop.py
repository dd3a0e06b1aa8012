"""Training: the same run however a batch is split, wherever it runs, and whatever interrupts it."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from nanochat_jax import checkpoint, commandline, config, run_log, trained_model
from nanochat_jax.config import REPOSITORY, GPTConfig, ModelFlags, UserError
from nanochat_jax.data import sources
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, processes
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import loop as train_module
from nanochat_jax.training import optim, passes, validation
from nanochat_jax.training import run as run_module
from nanochat_jax.training.batch_shape import BatchShape, rows_of_examples, rows_that_fit, shape_for_rows
from nanochat_jax.training.interruption import Interruption
from nanochat_jax.training.loop import DispatchedStep, StepLog, train
from nanochat_jax.training.run import compile_step, open_run, peak_memory
from nanochat_jax.training.step import TrainState, make_step

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, vocab_size=100, sequence_len=16)


pytestmark = pytest.mark.usefixtures("in_world")


def losses(run_dir) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in run_log.read(run_dir) if r["kind"] == "train"}


# -----------------------------------------------------------------------------
# The step


def one_step(grad_accum_steps: int, clip: float = 0.0, weights=None, tx=None):
    """Results and new parameters of one step on 8 rows, split into `grad_accum_steps` micro-batches."""
    tx = tx or optim.make_optimizer(MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02)
    params = gpt.init(MODEL, seed=1)
    ids = jax.random.randint(jax.random.key(0), (8, 17), 0, 100)
    targets = jnp.where(jnp.arange(8)[:, None] + jnp.arange(16)[None] < 12, ids[:, 1:], -1)  # rows with unequal counts
    batch = {"inputs": ids[:, :-1], "targets": targets} | ({} if weights is None else {"weights": weights})
    batch = {k: v.reshape(grad_accum_steps, -1, 16) for k, v in batch.items()}
    state, results = make_step(MODEL, tx, jnp.float32, clip)(TrainState(params, tx.init(params)), batch, 1.0)
    return results, state.params


def test_accumulation_equals_one_big_batch():
    (whole, params), (split, split_params) = one_step(1), one_step(4)
    assert split.loss == pytest.approx(float(whole.loss), rel=1e-5)  # weighted by tokens, not a mean of means
    assert split.grad_norm == pytest.approx(float(whole.grad_norm), rel=1e-4)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(split_params), strict=True):
        assert np.mean(np.abs(a - b) > 1e-3) < 0.01  # Adam's first step is a sign: tiny gradients may flip


def test_weights_of_zero_teach_nothing():
    results, _ = one_step(2, weights=jnp.zeros((8, 16)))
    assert results.loss == 0 and results.grad_norm == 0


def test_a_step_without_counted_targets_changes_nothing():
    """Item 6 of upstream's bugs, in a whole step."""
    tx = optim.make_optimizer(MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02)
    before = gpt.init(MODEL, seed=1)
    batch = {"inputs": jnp.zeros((2, 4, 16), jnp.int32), "targets": jnp.full((2, 4, 16), -1)}
    state, results = make_step(MODEL, tx, jnp.float32)(TrainState(gpt.init(MODEL, seed=1), tx.init(before)), batch, 1.0)
    assert results.loss == results.grad_norm == results.count == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    start = gpt.init(MODEL, seed=1)

    def moved(clip: float) -> tuple[float, float]:
        """(norm of the gradient, length of a step of plain gradient descent)."""
        results, params = one_step(2, clip, tx=optax.sgd(1.0))
        return float(results.grad_norm), float(optax.tree.norm(jax.tree.map(jnp.subtract, params, start)))

    norm, whole = moved(0.0)
    assert whole == pytest.approx(norm, rel=1e-4)
    assert moved(norm / 3) == pytest.approx((norm, norm / 3), rel=1e-4)
    assert moved(norm * 3) == pytest.approx((norm, norm), rel=1e-4)


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def ancestors(world):
    """Trains one run of each stage before the given one, for it to start from."""

    def upto(stage: str) -> None:
        for parent in ("base", "mid", "sft"):
            if parent == stage:
                return
            result = tiny.run(parent, world, model_tag="parent")  # trained once: the second time it is finished
            assert result.returncode == 0, result.stderr

    return upto


def test_data_that_end_skip_no_last_evaluation(world, ancestors):
    """A step is known to be the last only when no batch follows; by then, other evaluations have run at that step."""
    ancestors("sft")
    flags = {"num_iterations": -1, "eval_every": 1, "eval_metrics_every": 1000, "eval_metrics_tasks": "sums"}
    flags |= {"mixture": "sums=40", "eval_metrics_max_problems": 2, "save_every": -1}
    result = tiny.run("sft", world, model_tag="ends", source_tag="parent", **flags)
    assert result.returncode == 0, result.stderr
    records = run_log.read(checkpoint.run_dir("sft", "ends"))
    last = max(r["step"] for r in records if r["kind"] == "train")
    assert [r["step"] for r in records if r["kind"] == "val"] == list(range(last + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [last]


def test_the_same_seed_is_the_same_run_in_another_process(world, ancestors):
    """Item 24 of upstream's bugs. In another process, strings hash differently, so sets have another order."""
    ancestors("sft")
    for stage, kind in (("base", config.Base), ("mid", config.Mid)):
        parent = {"source_tag": "parent"} if stage == "mid" else {}
        train(commandline.parse(kind, tiny.command(stage, model_tag="again", **parent)[4:]))
        one, other = (losses(checkpoint.run_dir(stage, tag)) for tag in ("parent", "again"))
        assert one == other and len(one) == 8, "bit for bit"
    train(tiny.base_config(model_tag="another", num_iterations=2, seed=43))
    assert losses(checkpoint.run_dir("base", "another"))[2] != losses(checkpoint.run_dir("base", "again"))[2]


def test_what_a_run_needs_is_printed_before_the_first_shard_has_come(world):
    source, tokenizer = sources.open(), Tokenizer.load(world / "tokenizer")
    of = sum(len(tokenizer.encode(text)) + 1 for text in source.texts("val"))
    coming = tuple(source.val_files[0].with_name(f"{i}.parquet") for i in range(5))
    text = passes.Amount.of(dataclasses.replace(source, train_files=coming), tokenizer, world / "none").describe(3 * of)
    coming_text = f"{source.name}, 5 files of about {of} tokens, none of them here yet"
    assert text == f"{coming_text}; this run reads 3 of them, 0.60 epochs"


def test_interrupted_run_saves_and_goes_on(world):
    process = subprocess.Popen(
        tiny.command("base", model_tag="stopped", num_iterations=2000, max_epochs=1000, save_every=-1), cwd=REPOSITORY,
        env=tiny.environment(world), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = checkpoint.run_dir("base", "stopped")
    deadline = time.time() + 200
    while not losses(folder) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "run the same command again to resume" in output
    (saved,) = checkpoint.steps(folder)
    assert saved == max(losses(folder)) > 0


@pytest.mark.parametrize("mesh", ["", pytest.param("data=4,model=2", marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(world, mesh):
    tags = [f"{number}-{'model' if mesh else 'data'}" for number in (1, 8)]
    for tag, number in zip(tags, (1, 8), strict=True):
        flags = {
            "device_batch_size": 1,
            "total_batch_size": 512,
            "num_iterations": 4,
            "mesh": mesh if number > 1 else "",
        }
        result = tiny.run("base", world, number, model_tag=tag, **flags)
        assert result.returncode == 0, result.stderr
    one, other = (losses(checkpoint.run_dir("base", tag)) for tag in tags)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=2e-4)


@pytest.mark.slow
def test_eight_devices_sample_what_one_does(world, ancestors):
    """The same answers, rewards and first policy-gradient step; each device decodes its share of the answers."""
    ancestors("rl")
    for number in (1, 8):
        changes = {"source_tag": "parent", "device_batch_size": 1, "num_iterations": 2}
        result = tiny.run("rl", world, number, model_tag=f"on{number}", **changes)
        assert result.returncode == 0, result.stderr
    one, eight = ([r for r in run_log.read(checkpoint.run_dir("rl", f"on{d}")) if r["kind"] == "train"] for d in (1, 8))
    for name in ("reward", "sequence_length", "truncated", "zero_advantage"):
        assert [r[name] for r in one] == [r[name] for r in eight]
    assert eight[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4, abs=1e-6)


def test_finished_run_is_left_alone_and_a_different_one_refused(world, capsys):
    cfg = tiny.base_config(model_tag="twice", num_iterations=2)
    train(cfg)
    before = (checkpoint.run_dir("base", "twice") / run_log.LOG).read_text()
    train(cfg)
    assert "finished" in capsys.readouterr().out
    assert (checkpoint.run_dir("base", "twice") / run_log.LOG).read_text() == before
    with pytest.raises(UserError, match=r"matrix_lr: 0.02, now 0.03.*--model_tag.*--resume=never"):
        train(tiny.base_config(model_tag="twice", num_iterations=2, matrix_lr=0.03))
    train(tiny.base_config(model_tag="twice", num_iterations=2, matrix_lr=0.03, resume="never"))
    aside = list(checkpoint.run_dir("base", "twice").parent.glob(".twice.*"))
    assert len(aside) == 1 and checkpoint.steps(aside[0]) == [2]


def test_damaged_and_half_written_checkpoints_are_passed_over(world, capsys):
    cfg = tiny.base_config(model_tag="damaged", num_iterations=4)
    train(cfg)
    folder = checkpoint.run_dir("base", "damaged")
    assert checkpoint.steps(folder) == [2, 4]
    victim = max((checkpoint.step_dir(folder, 4) / "optimizer").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    victim.write_bytes(content)
    (folder / "step_000006").mkdir()
    assert checkpoint.latest(folder) == 2  # as a reader sees it: a trainer removes the half-written one
    out = capsys.readouterr().out
    assert "step_000006: half-written" in out
    assert "step_000004: optimizer" in out and "trying the checkpoint before it" in out
    train(cfg)  # resumes at 2 and saves 4 again
    assert checkpoint.latest(folder) == 4


def test_what_a_process_killed_while_saving_left_is_removed(world):
    folder = checkpoint.run_dir("base", "torn")
    command = tiny.command("base", model_tag="torn", num_iterations=2000, max_epochs=1000, save_every=1)

    def unfinished() -> list[str]:
        return [p.name for p in folder.glob("step_*") if not (p / checkpoint.MANIFEST).exists()]

    deadline = time.time() + 200
    while not unfinished() and time.time() < deadline:  # again if the checkpoint was complete just before the kill
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=tiny.environment(world), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (checkpoint.steps(folder) and unfinished()) and process.poll() is None and time.time() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (torn,) = unfinished()
    (folder / "config.json.12345.part").write_text("{")
    complete = checkpoint.steps(folder)
    with checkpoint.exclusive(folder):  # while another process holds the lock, nothing is removed
        assert tiny.run("base", world, model_tag="torn").returncode == 2
        assert unfinished() == [torn]
    resumed = tiny.run(
        "base", world, model_tag="torn", num_iterations=2000, max_epochs=1000, save_every=1, resume=complete[-1] + 5000
    )
    assert resumed.returncode == 2 and f"{torn}: half-written" in resumed.stdout
    assert f"no checkpoint of this step in {folder}; available: {complete[0]}" in resumed.stderr
    assert not unfinished() and not list(folder.glob("*.part")) and checkpoint.steps(folder) == complete


def test_second_process_on_the_same_run_is_refused(world):
    folder = checkpoint.run_dir("base", "locked")
    with checkpoint.exclusive(folder):
        result = tiny.run("base", world, model_tag="locked")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "another process is training" in result.stderr
    assert f"(process {os.getpid()} on {socket.gethostname()})" in result.stderr


def test_stage_without_its_predecessor_names_the_command(tmp_path):
    result = tiny.run("sft", tmp_path, model_tag="orphan")
    assert result.returncode == 2
    assert "stage mid has no run to start from: run python -m scripts.train --stage=mid" in result.stderr


def test_mid_sft_and_rl_follow_each_other(world, ancestors):
    ancestors("sft")
    for stage in ("mid", "sft", "rl"):
        more = {"eval_every": 2, "eval_examples": 3, "eval_samples": 2, "oversampling": 2} if stage == "rl" else {}
        result = tiny.run(stage, world, model_tag="parent", **more)
        assert result.returncode == 0, result.stderr
        records = run_log.read(checkpoint.run_dir(stage, "parent"))
        assert all(np.isfinite(r["loss"]) for r in records if r["kind"] == "train")
        model = trained_model.load(stage, "parent")
        assert model.meta["parent"].startswith({"mid": "base", "sft": "mid", "rl": "sft"}[stage] + " parent step")
    evaluated = [r for r in records if r["kind"] == "val"]
    assert [r["step"] for r in evaluated] == [0, 2, 4] and all(0 <= r["pass@1"] <= r["pass@2"] <= 1 for r in evaluated)
    assert all(r.keys() >= {"n", "pass@1_stderr", "pass@2_stderr", "truncated", "cut"} for r in evaluated)
    assert re.search(r"step 4 \| sums: pass@1 [\d.]+( ± [\d.]+)?, n=3 problems", result.stdout)
    assert [r["dt"] is None for r in records if r["kind"] == "train"] == [True, False, False, False]
    assert "4 per step, 4 answers each, 2 to train on" in result.stdout
    assert "  pass@k: 3 of 1,000 problems (Sums val), 2 answers each\n" in result.stdout


def test_compiling_is_no_part_of_any_step(world, monkeypatch):
    """Only the first step of a process includes the compilation; no later step or wait does."""
    made = train_module.step_of

    def slow(run):
        step, calls = made(run), []

        def compiled(*args):
            if not calls:
                time.sleep(3)
            calls.append(1)
            return step(*args)

        return compiled

    monkeypatch.setattr(train_module, "step_of", slow)
    train(tiny.base_config(model_tag="compiles", num_iterations=5, save_every=-1))
    records = [r for r in run_log.read(checkpoint.run_dir("base", "compiles")) if r["kind"] == "train"]
    assert [r["dt"] is None for r in records] == [True] + [False] * 4
    assert max(r["loader_wait"] for r in records) < 2 and max(r["dt"] for r in records[1:]) < 2


def test_speed_counts_the_tokens_of_all_micro_batches(world, monkeypatch):
    """Item 5 of upstream's bugs (#175)."""
    made = train_module.step_of

    def slow(run):
        step = made(run)
        return lambda *args: time.sleep(0.1) or step(*args)

    monkeypatch.setattr(train_module, "step_of", slow)
    monkeypatch.setattr(devices, "peak_flops", lambda: 1e9)
    train(tiny.base_config(model_tag="speed", num_iterations=5, save_every=-1))  # 2 micro-batches of 2 rows of 64
    records = [r for r in run_log.read(checkpoint.run_dir("base", "speed")) if r["kind"] == "train"]
    assert [(r["counted"], r["tokens"]) for r in records] == [(256, 256 * step) for step in range(1, 6)]
    for record in records[1:-1]:  # the first one compiles, the last one does not wait for the next
        assert record["dt"] > 0.1
        assert record["tok_per_s"] == pytest.approx(256 / record["dt"])
        assert record["mfu"] == pytest.approx(records[0]["flops"] / record["dt"] / 1e9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"total_batch_size": 100}, "--total_batch_size=100 is not a multiple of 64"),
     ({"device_batch_size": 3}, "--device_batch_size=3 does not divide the 4 rows"),
     ({"resume": "sometimes"}, "--resume=sometimes: must be auto, never or a step"),
     ({"num_iterations": -1, "target_param_data_ratio": 0.0}, "raise --target_param_data_ratio, or set --num_iter"),
     ({"num_iterations": -5}, "--num_iterations=-5: must be at least 1, or -1"),
     ({"grad_clip": -1.0}, "--grad_clip=-1.0: must be at least 0"), ({"matrix_lr": float("nan")}, "--matrix_lr=nan"),
     ({"seed": -1}, "--seed=-1: must be from 0 to 2147483647"),
     ({"seed": 2**40}, "--seed=1099511627776: must be from 0 to 2147483647"),
     ({"warmup_ratio": 2.0}, "--warmup_ratio=2.0: must be from 0 to 1"), ({"keep_last": 0}, "--keep_last=0: must be"),
     ({"max_seq_len": 1}, "--max_seq_len=1: must be at least 2"),
     ({"device_type": "abacus"}, "--device_type=abacus: must be cpu, gpu, cuda or tpu"),
     ({"compute_dtype": "float8"}, "--compute_dtype=float8")],
)  # fmt: skip
def test_what_cannot_work_is_refused(world, changes, words):
    with pytest.raises(UserError, match=words):
        train(tiny.base_config(model_tag="refused", **changes))


def test_the_process_that_needs_most_memory_decides(monkeypatch):
    """Otherwise, two hosts could choose different numbers of rows, and wait for each other for ever."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "all_gather", lambda mine: [mine, int(1.5 * mine)])
    assert rows_that_fit(MODEL, 8, lambda grad_accum_steps, n: n * 10**6, limit=7 * 10**6) == 4
    assert rows_that_fit(MODEL, 8, lambda grad_accum_steps, n: n * 10**6, limit=5 * 10**6) == 2


@pytest.mark.parametrize(("rows", "fits"), [(8, 4), (12, 4), (7, 1), (3, 3), (1, 1)])
def test_automatic_device_batch_is_the_largest_divisor_that_fits(rows, fits):
    tried = []

    def need(grad_accum_steps, n):
        tried.append(n)
        assert grad_accum_steps * n == rows
        return 10**8 + n * 10**6

    assert rows_that_fit(MODEL, rows, need, limit=10**8 + 45 * 10**5) == fits
    assert tried == sorted(tried, reverse=True)


def test_automatic_device_batch_takes_what_the_estimate_did_not_expect():
    """For example, the memory that --shard=full and --remat save."""
    d20 = ModelFlags(depth=20).gpt_config(65536)
    tried = []

    def need(grad_accum_steps, n):
        tried.append(n)
        return 10**9 + n * 3 * 10**8

    assert rows_that_fit(d20, 256, need, limit=75 * 10**9) == 128
    assert tried == sorted(tried) and len(tried) <= 5
    huge = ModelFlags(depth=60).gpt_config(65536)
    assert rows_that_fit(huge, 16, lambda grad_accum_steps, n: 10**10 + n * 3 * 10**9, limit=75 * 10**9) == 16


def test_automatic_device_batch_says_what_to_do_when_nothing_fits():
    with pytest.raises(UserError, match="--remat=full"):
        rows_that_fit(MODEL, 8, lambda grad_accum_steps, n: 2**30, limit=2**20)


def test_memory_of_a_compiled_step_grows_with_its_rows(world):
    with open_run(tiny.base_config(model_tag="memory"), 0.95) as run:
        small, large = (peak_memory(compile_step(run, 1, n)) for n in (1, 8))
        run.load_state()
        state = sum(x.nbytes for x in jax.tree.leaves(run.state))
    assert state < small < large


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [(run_module, "_initial_state", "for the weights .*--shard=full"),
     (train_module, "step_of", r"for a step: lower --device_batch_size \(now 2\)"),
     (validation, "validate", "for an evaluation: turn off .*--sample_every")],
)  # fmt: skip
def test_out_of_memory_names_the_flag(world, monkeypatch, module, name, words):
    def explode(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")

    monkeypatch.setattr(module, name, (lambda run: explode) if name == "step_of" else explode)
    with pytest.raises(UserError, match=f"^out of memory.*{words}"):
        train(tiny.base_config(model_tag="large"))


def test_ids_outside_the_vocabulary_are_refused():
    batch = {"inputs": np.zeros((2, 64), np.int32), "targets": np.full((2, 64), 320, np.int32)}
    with pytest.raises(UserError, match="token id 320 among the targets is outside the vocabulary of 320"):
        BatchShape(1, 2, 1, 64).shaped(batch, None, 320)
    for changed, words in (({"inputs": -1}, "id -1 among the inputs"), ({"targets": -2}, "id -2 among the targets")):
        batch = {name: np.full((2, 64), changed.get(name, 0), np.int32) for name in ("inputs", "targets")}
        with pytest.raises(UserError, match=words):
            BatchShape(1, 2, 1, 64).shaped(batch, None, 320)


def test_a_batch_that_is_left_on_the_host_is_refused(world, monkeypatch):
    """An implicit transfer would silently stall every step."""
    monkeypatch.setattr(BatchShape, "shaped", lambda self, batch, *_: {k: v[None] for k, v in batch.items()})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tiny.base_config(model_tag="host", device_batch_size=4))


def test_rows_of_conversations_are_no_more_than_asked():
    for examples, length, rows in ((32, 100, 50), (32, 99, 50), (32, 16, 8), (30, 17, 8), (1, 9, 1)):
        assert rows_of_examples(examples, length, 64) == rows
    for examples in (0, -1):
        with pytest.raises(UserError, match=rf"^--target_examples_per_step={examples}: must be at least 1"):
            config.Sft(target_examples_per_step=examples)


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 50])
@pytest.mark.parametrize("devices", [1, 8, 16])
@pytest.mark.parametrize("at_once", [0, 1, 4])
def test_as_many_rows_are_split_over_any_number_of_devices(rows, devices, at_once):
    shape = shape_for_rows(rows, at_once, 64, devices, fit=lambda share: 1)
    assert shape.total_rows == rows and shape.tokens == 64 * rows
    assert shape.padding < devices * shape.rows and shape.rows <= max(1, at_once)
    if devices == 1 and not at_once:
        assert shape.padding == 0


@pytest.mark.slow
def test_finetuning_on_eight_devices_is_the_same_recipe(world, ancestors):
    ancestors("sft")
    for number in (1, 8):
        changes = {"total_batch_size": 0, "target_examples_per_step": 6, "num_epochs": 1, "num_iterations": -1}
        changes |= {"mixture": "sums=400,identity=100"}  # many are longer than a row and are skipped
        result = tiny.run("sft", world, number, model_tag=f"on{number}", source_tag="parent", **changes)
        assert result.returncode == 0, result.stderr
    one, eight = (
        [r for r in run_log.read(checkpoint.run_dir("sft", f"on{d}")) if r["kind"] == "train"] for d in (1, 8)
    )
    assert [r["counted"] for r in one] == [r["counted"] for r in eight] and len(one) > 10
    np.testing.assert_allclose([r["loss"] for r in eight], [r["loss"] for r in one], rtol=2e-4)
    assert one[-1]["tokens"] == eight[-1]["tokens"]


def test_a_line_about_a_step_says_what_is_worth_saying_and_fits(capsys):
    run, stage = SimpleNamespace(totals={"tokens": 6_291_456_000, "seconds": 14_880.6}), SimpleNamespace(steps=21400)
    log = StepLog(run, stage, Interruption())
    log._smooth_loss, log._weight = 3.1234, 1.0
    log._steps_timed, log._seconds_timed = 100, 124.0
    place = {"epoch": 0, "shard": 112, "row_group": 45, "progress": 0.5, "waste": 0.0, "skipped": 0}
    done = DispatchedStep(12000, {}, lr_mult=1.0, waited=0.0002, info=place)
    log._print(done, grad_norm=0.123, dt=1.24, speed=422_813, mfu=0.412)
    quiet = capsys.readouterr().out.rstrip("\n")
    assert quiet == (
        "step 12000/21400 (56.1%) | loss 3.1234 | grad 0.123 | 1240 ms | 423K tok/s | mfu 41.2% | 6.29B tokens | "
        "total 248.01m | "
        "epoch 0 shard 112 group 45 | waste 0.0% | wait 0 ms | eta 3h14m"
    )
    assert len(quiet) <= 185
    wasteful = done._replace(lr_mult=0.5, waited=0.034, info=place | {"waste": 0.012, "skipped": 1234})
    log._print(wasteful, grad_norm=0.123, dt=1.24, speed=422_813, mfu=None)
    line = capsys.readouterr().out
    assert "lr x0.500" in line and "waste 1.2% | skipped 1,234 | wait 34 ms | eta" in line and "mfu n/a" in line
    first = done._replace(waited=0.0, info={"shard": None, "progress": 0.25, "waste": 0.0004})
    log._print(first, grad_norm=0.123, dt=None, speed=None, mfu=None)
    assert (
        "compiled | mfu n/a | 6.29B tokens | total 248.01m | epoch 0.25 | waste 0.0% | wait 0 ms | eta"
        in capsys.readouterr().out
    )
