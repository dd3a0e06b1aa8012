"""Checkpoints: all damage is found, a full disk destroys nothing, old checkpoints are removed as configured."""

import random
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import checkpoint, trained_model
from nanochat_jax.config import UserError

DATA = {"packing": "split", "rows": 3}
META = {"stage": "base", "step": 0, "totals": {"tokens": 7}}


def state(step, size=1000):
    noise = jax.random.normal(jax.random.key(step), (2, size))  # noise does not compress
    params = {"wte": noise[0], "blocks": {"wq": jnp.full((2, 3), float(step))}}
    return params, {"count": jnp.int32(step), "momentum": noise[1]}


def save(saver, *steps, **kwargs):
    for step in steps:
        saver.save(step, *state(step, **kwargs), DATA | {"rows": step}, META | {"step": step})
    saver.wait_all()


def equal(a, b):
    same = map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(same)


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restored(run, step):
    return checkpoint.restore(run, step, *like(state(0)))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with steps 1 and 2, for tests to copy and damage."""
    folder = tmp_path_factory.mktemp("two") / "run"
    folder.mkdir()
    save(checkpoint.Saver(folder, keep_last=2), 1, 2)
    return folder


@pytest.fixture
def copy(two_steps, run):
    shutil.copytree(two_steps, run, dirs_exist_ok=True)
    return run


def files_of(run, step):
    folder = checkpoint.step_dir(run, step)
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


# -----------------------------------------------------------------------------
# Saving and restoring


def test_what_is_saved_is_what_is_restored(run):
    save(checkpoint.Saver(run, keep_last=2), 1, 2)
    for step in (1, 2):
        params, opt_state, data, meta = restored(run, step)
        assert equal((params, opt_state), state(step))
        assert data == DATA | {"rows": step} and meta == META | {"step": step}


def test_the_caller_may_overwrite_what_it_saves(run):
    saver, (params, opt_state), meta = checkpoint.Saver(run, keep_last=1), state(1, size=1_000_000), dict(META)
    saver.save(1, params, opt_state, DATA, meta)
    meta["stage"] = "changed"
    for leaf in jax.tree.leaves((params, opt_state)):
        leaf.delete()  # as the next step's donation does
    saver.wait_all()
    *arrays, _, saved_meta = checkpoint.restore(run, 1, *like(state(0, size=1_000_000)))
    assert equal(tuple(arrays), state(1, size=1_000_000)) and saved_meta == META


def test_the_caller_goes_on_while_it_is_written(run, monkeypatch):
    write, go_on = checkpoint._write_manifest, threading.Event()
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda folder: go_on.wait(60) and write(folder))
    saver = checkpoint.Saver(run, keep_last=1)
    saver.save(1, *state(1), DATA, META)
    assert checkpoint.steps(run) == []
    go_on.set()
    saver.wait_all()
    assert checkpoint.steps(run) == [1]


def test_restoring_casts(run):
    save(checkpoint.Saver(run, keep_last=1), 3)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state(0)[0])
    params = checkpoint.restore_params(run, 3, half)
    assert equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state(3)[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda p: p | {"wte": p["wte"][:10]}, r"params/wte is \(1000,\) there, but \(10,\) here"),
     (lambda p: p | {"blocks": p["blocks"] | {"wk": p["wte"]}}, r"params/blocks/wk is missing there"),
     (lambda p: {"wte": p["wte"]}, r"params/blocks/wq is \(2, 3\) there, but missing here")],
)  # fmt: skip
def test_arrays_of_another_shape_are_one_line(two_steps, change, words):
    params, opt_state = state(0)
    for restore in (
        lambda: checkpoint.restore(two_steps, 2, like(change(params)), like(opt_state)),
        lambda: checkpoint.restore_params(two_steps, 2, like(change(params))),
    ):
        with pytest.raises(UserError, match=words) as refused:
            restore()
        assert "\n" not in str(refused.value)


def test_the_last_and_every_so_many_steps_are_kept(run):
    save(checkpoint.Saver(run, keep_last=2, keep_every=4), *range(1, 12))
    assert checkpoint.steps(run) == [4, 8, 10, 11]
    save(checkpoint.Saver(run, keep_last=1), 12)
    assert checkpoint.steps(run) == [12]


def test_the_step_just_saved_stays_whatever_comes_after_it(run):
    save(checkpoint.Saver(run, keep_last=2), 6, 8)
    save(checkpoint.Saver(run, keep_last=1), 4)
    assert checkpoint.steps(run) == [4, 6, 8]
    save(checkpoint.Saver(run, keep_last=1), 5)
    assert checkpoint.steps(run) == [5, 6, 8]


def test_a_step_that_is_being_removed_does_not_look_complete(run, monkeypatch):
    saver = checkpoint.Saver(run, keep_last=1)
    save(saver, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed there
    save(saver, 2)
    assert checkpoint.step_dir(run, 1).exists() and checkpoint.steps(run) == [2]


def test_a_second_process_is_refused_and_the_lock_ends_with_the_first(run):
    refused = pytest.raises(UserError, match="another process is training")
    with checkpoint.exclusive(run), refused, checkpoint.exclusive(run):
        pass
    with checkpoint.exclusive(run):
        pass


# -----------------------------------------------------------------------------
# Damage


def spoil(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "emptied":
        content.clear()
    path.write_bytes(content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied", "missing"])
def test_any_file_spoilt_means_the_step_before(copy, how, capsys):
    rng, names = random.Random(how), files_of(copy, 2)
    assert len(names) > 15
    for name in names:
        path = checkpoint.step_dir(copy, 2) / name
        before = path.read_bytes()
        if not before and how != "missing":
            continue
        capsys.readouterr()
        spoil(path, how, rng)
        assert checkpoint.latest(copy) == 1, name
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and f"ignoring {checkpoint.step_dir(copy, 2)}: " in out
        assert str(name) in out or name.name == checkpoint.MANIFEST, out
        path.write_bytes(before)
    assert checkpoint.latest(copy) == 2
    assert equal(restored(copy, 1)[:2], state(1))


def test_any_bit_of_the_manifest_matters(copy):
    path, rng = checkpoint.step_dir(copy, 2) / checkpoint.MANIFEST, random.Random(0)
    content = path.read_bytes()
    for place in rng.sample(range(len(content)), 300):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        assert checkpoint.damage(checkpoint.step_dir(copy, 2)), (place, path.read_bytes()[place - 9 : place + 9])


def test_half_written_is_ignored(copy, capsys):
    """Item 14 of upstream's bugs (#336)."""
    torn = checkpoint.step_dir(copy, 3)
    shutil.copytree(checkpoint.step_dir(copy, 2), torn)
    (torn / checkpoint.MANIFEST).unlink()
    (copy / "step_000004.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(copy) == [1, 2] and checkpoint.latest(copy) == 2
    assert f"ignoring {torn}: half-written" in capsys.readouterr().out
    checkpoint.clear_unfinished(copy)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000001", "step_000002"]


BESIDE = ["step_000020-hf", "step_5", "step_000020 (copy)", "step_٠٠٠٠٢٠", "step_0000020", "step_", "step_000002.bak",
          "abandoned_step_000002.2026", "step_000003.orbax-checkpoint-tmp-hf", "mine.orbax-checkpoint-tmp"]  # fmt: skip


@pytest.mark.parametrize("with_manifest", [False, True])
def test_what_is_not_ours_is_neither_read_nor_removed(copy, with_manifest, monkeypatch):
    """Such as a converted model beside the checkpoint that it was made from."""
    for name in BESIDE:
        (copy / name).mkdir()
        (copy / name / "model.safetensors").write_text(name)
        if with_manifest:
            (copy / name / checkpoint.MANIFEST).write_text("{}")
    for name in ("step_000004", "notes.part", "lock.12.part"):
        (copy / name).write_text("a file")
    before = sorted(p for p in copy.rglob("*") if "step_000002/" not in str(p) and "step_000001" not in str(p))
    assert checkpoint.steps(copy) == [1, 2] and checkpoint.latest(copy) == 2
    checkpoint.clear_unfinished(copy)
    checkpoint.abandon_after(copy, 2)
    saver = checkpoint.Saver(copy, keep_last=1)
    save(saver, 3, 5)
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda folder: 1 / 0)
    with pytest.raises(UserError, match="last good checkpoint is step 5"):
        save(saver, 6)
    assert checkpoint.steps(copy) == [5] and not (copy / "step_000006").exists()
    assert [p for p in before if p.exists()] == [p for p in before if p.name not in ("step_000002",)]


def test_a_link_to_a_checkpoint_elsewhere_is_read_but_not_removed(copy, tmp_path):
    elsewhere = (copy / "step_000001").rename(tmp_path / "other disk")
    (copy / "step_000001").symlink_to(elsewhere)
    assert checkpoint.steps(copy) == [1, 2]
    save(checkpoint.Saver(copy, keep_last=1), 3)
    assert checkpoint.steps(copy) == [1, 3] and (elsewhere / checkpoint.MANIFEST).exists()
    (elsewhere / checkpoint.MANIFEST).unlink()
    checkpoint.clear_unfinished(copy)
    assert elsewhere.exists()


@pytest.mark.parametrize("manifest", ["[1]", "3", "{", "[" * 100_000])
def test_a_manifest_that_is_no_object_is_damage(copy, manifest):
    (copy / "step_000002" / checkpoint.MANIFEST).write_text(manifest)
    assert checkpoint.damage(copy / "step_000002") == "manifest.json is damaged" and checkpoint.latest(copy) == 1


def test_nothing_good_is_none(copy, capsys):
    for step in (1, 2):
        spoil(checkpoint.step_dir(copy, step) / "meta.json", "flipped", random.Random(step))
    assert checkpoint.latest(copy) is None
    assert capsys.readouterr().out.count("meta.json is damaged") == 2


def test_a_model_to_talk_to_does_not_need_the_optimizer(two_steps, own_base_dir, capsys):
    """Each file either is not needed, or its damage is found before anything is loaded."""
    folder = checkpoint.run_dir("base", "tag")
    folder.parent.mkdir(parents=True)
    shutil.copytree(two_steps, folder)
    abstract = like(state(0)[0])
    for name in files_of(folder, 2):
        path = checkpoint.step_dir(folder, 2) / name
        before = path.read_bytes()
        if not before:
            continue
        spoil(path, "truncated", random.Random(0))
        needed = name.parts[0] != "optimizer" and name.name != "data.json"
        assert trained_model.find("base", "tag") == (folder, 1 if needed else 2), name
        if not needed:
            assert equal(checkpoint.restore_params(folder, 2, abstract), state(2)[0])
        elif name.name != checkpoint.MANIFEST:
            with pytest.raises(UserError, match="is damaged"):
                trained_model.find("base", "tag", 2)
        path.write_bytes(before)


# -----------------------------------------------------------------------------
# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(small_disk):
    saver = checkpoint.Saver(small_disk, keep_last=2)
    save(saver, 1, size=100_000)
    full = r"the disk is full: \d MB free, the last checkpoint takes \d MB"
    message = rf"could not save .*\({full}\).*good checkpoint is step 1$"
    for size in (900_000, 2_000_000):
        with pytest.raises(UserError, match=message) as caught:
            save(saver, 2, size=size)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in small_disk.iterdir()) == ["step_000001"], "what is useless takes no room"
        assert checkpoint.latest(small_disk) == 1
    first = checkpoint.restore(small_disk, 1, *like(state(0, size=100_000)))
    assert equal(first[:2], state(1, size=100_000))
    save(saver, 2, size=100_000)
    assert checkpoint.steps(small_disk) == [1, 2], "once there is room again, the run continues"


def test_a_disk_full_to_the_last_byte(small_disk):
    saver = checkpoint.Saver(small_disk, keep_last=2)
    save(saver, 1, size=100_000)
    with pytest.raises(OSError, match="No space"):
        (small_disk / "ballast").write_bytes(bytes(6_400_000))
    with pytest.raises(UserError, match="the disk is full: 0 MB free"):
        save(saver, 2, size=100_000)
    assert checkpoint.latest(small_disk) == 1


def test_a_failed_save_is_reported_without_waiting_for_the_next(small_disk):
    saver = checkpoint.Saver(small_disk, keep_last=1)
    saver.raise_if_failed()
    saver.save(1, *state(1, size=2_000_000), DATA, META)
    saver._thread.join()
    with pytest.raises(UserError, match=r"the disk is full: 6 MB free\); there is no earlier checkpoint"):
        saver.raise_if_failed()
    saver.raise_if_failed()
