"""What is told of the machine."""

import re
import subprocess

import pytest

from nanochat_jax import config, environment


@pytest.fixture(autouse=True)
def asked_anew():
    environment.versions.cache_clear()
    yield
    environment.versions.cache_clear()


def git(folder, *args):
    name = ("-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", "-C", str(folder), *name, *args], check=True, capture_output=True)


def test_the_commit_is_told_and_whether_files_differ_from_it(tmp_path, monkeypatch):
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
    assert not environment.versions()["commit"].endswith("+"), "they came after the start"
    environment.versions.cache_clear()
    assert environment.versions()["commit"].endswith("+")


def test_a_package_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    told = environment.versions()
    assert re.match(r"\d+\.\d+", told["numpy"]) and told["no-such-package"] == "not installed"
