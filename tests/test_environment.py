"""The description of the machine, the code and the versions."""

import re
import subprocess

import pytest

from nanochat_jax import config, environment
from nanochat_jax.parallel import devices


@pytest.fixture(autouse=True)
def empty_cache():
    environment.versions.cache_clear()
    yield
    environment.versions.cache_clear()


def git(folder, *args):
    name = ("-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", "-C", str(folder), *name, *args], check=True, capture_output=True)


def test_the_commit_is_given_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.code() == "not a git checkout" and environment.versions()["commit"] == ""
    environment.versions.cache_clear()
    git(tmp_path, "init", "-b", "trunk")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    assert re.fullmatch("commit [0-9a-f]{12} on trunk", environment.code())
    assert re.fullmatch("[0-9a-f]{40}", environment.versions()["commit"])
    (tmp_path / "new").touch()
    assert environment.code().endswith(" on trunk with local changes")
    assert not environment.versions()["commit"].endswith("+"), "the file was added after the start"
    environment.versions.cache_clear()
    assert environment.versions()["commit"].endswith("+")


def test_a_package_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    versions = environment.versions()
    assert re.match(r"\d+\.\d+", versions["numpy"]) and versions["no-such-package"] == "not installed"


def test_the_devices_are_asked_for_in_a_child_process():
    """The child's import is in a string, so only running it shows that it still resolves."""
    assert re.fullmatch(r"\d+ x .+ \(cpu\), jax \S+", devices.described_by_child())


def test_devices_that_cannot_be_asked_for_are_unknown_with_the_reason(tmp_path, monkeypatch):
    for program, reason in (("echo trouble >&2; echo no module >&2; exit 1", "no module"), ("exit 3", "exit code 3")):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(devices.sys, "executable", str(tmp_path / "python"))
        assert devices.described_by_child() == f"unknown ({reason})"
    monkeypatch.setattr(devices.sys, "executable", str(tmp_path / "none"))
    assert devices.described_by_child().startswith("unknown ([Errno 2] No such file")
