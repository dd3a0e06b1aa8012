"""Files: atomic writes, {} for anything but a JSON object, and a folder's lock."""

import errno
import fcntl
import subprocess
import sys

import pytest

from nanochat_jax import files
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.files import atomic_write, exclusive, read_json, remove_parts, sha256, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    for text in ('{"a": 1}', '{"a": "ü"}'):
        write_text(path, text)
    assert read_json(path) == {"a": "ü"} and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", '{"a": 1}')
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", '{"a": "\ud83c"}')
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json") == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_held_by_one_until_its_block_ends(tmp_path):
    for _ in range(2):
        with (
            exclusive(tmp_path / "run", "taken"),
            pytest.raises(UserError, match="taken"),
            exclusive(tmp_path / "run", "taken"),
        ):
            pass


def test_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3"])
def test_no_object_is_an_empty_one(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == {}


def test_only_the_parts_that_atomic_write_left_are_removed(tmp_path):
    theirs = [
        "config.json.part",
        "config.json.old.part",
        "xconfig.json.12.part",
        "video.1.part",
        "config.json.12.parts",
    ]
    for name in (*theirs, "config.json.12345.part", "config.json"):
        (tmp_path / name).write_text("x")
    remove_parts(tmp_path / "config.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, "config.json"])


# -----------------------------------------------------------------------------
# Locks


NO_LOCKS = ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL")


@pytest.fixture(autouse=True)
def unsaid():
    files.print_once.cache_clear()


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks_is_said_once_and_used(tmp_path, monkeypatch, capsys, name):
    def refuse(*_):
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with exclusive(tmp_path / "run", "taken"):
            (tmp_path / "run" / "file").write_text("x")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"{tmp_path / 'run'} cannot be locked (" in out and "only one process" in out


def test_a_system_without_flock_is_said_once_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for _ in range(2):
        with exclusive(tmp_path / "run", "taken"):
            (tmp_path / "run" / "file").write_text("x")
    assert capsys.readouterr().out.count("this system has no file locks") == 1


def test_other_errors_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    refused = pytest.raises(UserError, match=r"cannot be written to \(\w+ \w+\): set NANOCHAT_BASE_DIR")
    with refused, exclusive(tmp_path / "file", "taken"):
        pass


def test_a_folder_that_stays_empty_is_removed_with_its_lock(tmp_path):
    run = tmp_path / "base_checkpoints" / "d4"
    with pytest.raises(ZeroDivisionError), exclusive(run, "taken"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    run.parent.mkdir()  # by someone else
    with exclusive(run, "taken"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["base_checkpoints"]
    with exclusive(run, "taken"):
        (run / "log.jsonl").write_text("x")
    assert sorted(p.name for p in run.iterdir()) == ["lock", "log.jsonl"]


def test_a_refused_process_leaves_the_lock_of_another_alone(tmp_path):
    run = tmp_path / "d4"
    with exclusive(run, "taken"):
        with pytest.raises(UserError, match="taken"), exclusive(run, "taken"):
            pass
        assert (run / "lock").exists()
        with pytest.raises(UserError, match="taken"), exclusive(run, "taken"):
            pass


COUNT = """
import sys
from pathlib import Path
from nanochat_jax.files import exclusive
from nanochat_jax.config import UserError
folder, inside, taken = Path(sys.argv[1]), Path(sys.argv[2]), 0
while taken < 100:
    try:
        with exclusive(folder / "a" / "b", "taken"):
            inside.touch(exist_ok=False)
            inside.unlink()
            taken += 1
    except UserError as error:
        assert str(error).startswith("taken ("), error
"""


def test_a_folder_that_comes_and_goes_is_never_held_by_two(tmp_path):
    """Each process removes the folder and its lock file, again and again, while others try to lock it."""
    command = [sys.executable, "-c", COUNT, str(tmp_path / "x"), str(tmp_path / "inside")]
    started = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    assert not (tmp_path / "x" / "a" / "b").exists()
