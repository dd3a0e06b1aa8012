"""The tiny world in which the tests of a module train."""

import pytest
import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base folder with a corpus and a tokenizer, shared by the tests of a module; each test uses its own tag."""
    base = tmp_path_factory.mktemp("world")
    tiny.make_world(base)
    return base


@pytest.fixture
def in_world(own_base_dir, world, monkeypatch):
    """Makes `world` the base folder of a test."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
