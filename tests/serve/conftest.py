"""The tokenizer and the scripted engine of most tests of the server."""

import pytest
from serving import TEXT, ScriptedEngine, answer_ids

from nanochat_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXT), 300)


@pytest.fixture
def engine(tokenizer):
    """Answers every question with "well and good"."""
    return ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "well and good"))
