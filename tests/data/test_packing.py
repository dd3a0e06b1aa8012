"""Rows from documents: what must never be lost, and what must be counted."""

import doctest
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data import packing

BOS = 0
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60)
widths = st.integers(2, 33)


def numbered(lengths):
    """Documents of different tokens, counted through the whole corpus: [2, 1] -> [BOS, 1, 2], [BOS, 3]."""
    starts = np.cumsum([1, *lengths])
    return [packing.document([BOS, *range(a, a + n)]) for a, n in zip(starts[:-1], lengths, strict=True)]


def make_packer(method, width):
    return packing.Stream(width, BOS) if method == "stream" else packing.BestFit(method, width, BOS)


def pack(method, width, documents):
    """All rows of the documents, and the packer that made them."""
    packer = make_packer(method, width)
    for document in documents:
        packer.add(document)
    rows = []
    while len(packer):
        rows.append(packer.row())
    return np.stack(rows), packer


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(packing)
    assert results.attempted >= 5 and not results.failed


def tokens(rows):
    return sorted(rows[rows > 0].tolist())


@settings(deadline=None)
@given(lengths, widths)
def test_split_loses_nothing_and_every_row_begins_with_bos(lengths, width):
    rows, _ = pack("split", width, numbered(lengths))
    assert tokens(rows) == list(range(1, sum(lengths) + 1))
    assert (rows[:, 0] == BOS).all()
    assert (rows[:-1] >= 0).all(), "only the last row may be padded"


@settings(deadline=None)
@given(lengths, widths)
def test_split_predicts_every_token_once_in_the_context_of_its_own_document(lengths, width):
    batch = packing.as_batch(pack("split", width, numbered(lengths))[0])
    targets = batch["targets"]
    assert tokens(targets) == list(range(1, sum(lengths) + 1))
    inside = targets > 0
    previous = batch["inputs"][inside]
    assert ((previous == targets[inside] - 1) | (previous == BOS)).all(), "a token follows its predecessor or a BOS"


@settings(deadline=None)
@given(lengths, widths)
def test_split_never_joins_two_documents(lengths, width):
    rows, _ = pack("split", width, numbered(lengths))
    flat = rows[rows >= 0].tolist()
    before = {token: flat[i - 1] for i, token in enumerate(flat) if token != BOS}
    firsts = set(np.cumsum([1, *lengths[:-1]]).tolist())
    for token, previous in before.items():
        assert previous == BOS or (previous == token - 1 and token not in firsts)


@pytest.mark.parametrize("method", ["split", "stream"])
def test_a_document_of_millions_of_tokens_is_not_copied_for_every_row(method):
    packer = make_packer(method, 2049)
    packer.add(packing.document(np.arange(20_000_000)))
    start = time.perf_counter()
    for _ in range(1000):
        row = packer.row()
    assert time.perf_counter() - start < 5  # copying 80 MB per row would take half a minute
    assert row[-1] == 1000 * 2048


@settings(deadline=None)
@given(lengths, widths)
def test_crop_counts_what_it_throws_away(lengths, width):
    rows, packer = pack("crop", width, numbered(lengths))
    kept = tokens(rows)
    assert len(set(kept)) == len(kept), "no token occurs twice"
    assert (rows[:, 0] == BOS).all()
    discarded = sum(lengths) - len(kept)
    padded = int((rows < 0).sum())
    assert packer.waste == pytest.approx((discarded + padded) / (rows.size + discarded))


@settings(deadline=None)
@given(lengths, widths)
def test_stream_is_the_documents_end_to_end(lengths, width):
    documents = numbered(lengths)
    batch = packing.as_batch(pack("stream", width, documents)[0])
    flat = np.concatenate(documents)
    np.testing.assert_array_equal(batch["inputs"].ravel()[: len(flat) - 1], flat[:-1])
    np.testing.assert_array_equal(batch["targets"].ravel()[: len(flat) - 1], flat[1:])
    assert (batch["targets"].ravel()[len(flat) - 1 :] == -1).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 31), min_size=1, max_size=60))
def test_whole_never_cuts(lengths):
    rows, _ = pack("whole", 32, numbered(lengths))
    documents = {tuple(d) for d in numbered(lengths)}
    for row in rows:
        filled = row[row >= 0]
        for piece in np.split(filled, np.flatnonzero(filled == BOS)[1:]):
            documents.remove(tuple(piece))
        assert (row[len(filled) :] < 0).all(), "padding comes last"
    assert not documents


@settings(deadline=None)
@given(st.sampled_from(["split", "crop", "whole", "stream"]), st.lists(st.integers(1, 15), min_size=1, max_size=40))
def test_state_round_trip_at_every_position(method, lengths):
    expected, _ = pack(method, 16, numbered(lengths))
    packer = make_packer(method, 16)
    for document in numbered(lengths):
        packer.add(document)
    for i in range(len(expected)):
        other = make_packer(method, 16)
        other.restore(json.loads(json.dumps(packer.state())))
        assert other.state() == packer.state()
        rest = []
        while len(other):
            rest.append(other.row())
        np.testing.assert_array_equal(np.stack(rest), expected[i:])
        packer.row()


def test_masked_tokens_are_inputs_but_not_targets():
    rows = packing.document([BOS, 7, 8, 9], [0, 0, 1, 0])[None]
    batch = packing.as_batch(rows)
    assert batch["inputs"].tolist() == [[BOS, 7, 8]]
    assert batch["targets"].tolist() == [[-1, 8, -1]]
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32


def test_padding_has_no_targets_even_though_bos_is_zero():
    batch = packing.as_batch(packing.empty_row(5, BOS)[None])
    assert (batch["inputs"] == BOS).all() and (batch["targets"] == -1).all()


def test_a_long_document_is_split_before_it_piles_up():
    short = [packing.document([BOS, 99]) for _ in range(50)]
    rows, _ = pack("split", 9, [packing.document([BOS, *range(1, 25)]), *short])
    assert tokens(rows[:3]) == list(range(1, 25))


def test_best_fit_prefers_the_largest_that_fits_then_the_oldest():
    packer = packing.BestFit("crop", 10, BOS)
    for ids in ([0, 1, 1, 1], [0, 2, 2, 2, 2, 2], [0, 3, 3, 3], [0] + [4] * 20):
        packer.add(packing.document(ids))
    assert packer.row().tolist() == [0, 2, 2, 2, 2, 2, 0, 1, 1, 1]
    assert packer.row().tolist() == [0, 3, 3, 3, 0, 4, 4, 4, 4, 4]
