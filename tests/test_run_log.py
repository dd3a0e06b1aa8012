"""The log of a run."""

import json
import tracemalloc

import pytest

from nanochat_jax import run_log
from nanochat_jax.config import UserError


def test_texts_with_any_separator_are_read_whole(tmp_path):
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1eb", "a\nb", "a\r\nb"]
    for step, text in enumerate(texts):
        run_log.append(tmp_path, "sample", "base", step, text=text)
    assert [r["text"] for r in run_log.read(tmp_path)] == texts


def test_a_torn_line_is_skipped_and_the_next_record_is_whole(tmp_path):
    run_log.append(tmp_path, "note", "base", 1, text="before")
    with open(tmp_path / run_log.LOG, "a", encoding="utf-8") as log:
        log.write('{"kind": "note", "ste')
    run_log.append(tmp_path, "note", "base", 2, text="after")
    assert [r["text"] for r in run_log.read(tmp_path)] == ["before", "after"]


def test_torn_log_line_is_skipped_and_later_records_hold(tmp_path):
    run_log.append(tmp_path, "train", "base", 1, loss=3.0)
    run_log.append(tmp_path, "train", "base", 1, loss=2.0, mfu=float("inf"))
    with open(tmp_path / run_log.LOG, "a", encoding="utf-8") as log:
        log.write('{"kind": "tra')
    (record,) = run_log.read(tmp_path)
    assert record["loss"] == 2.0 and record["mfu"] is None
    json.loads((tmp_path / run_log.LOG).read_text().splitlines()[1])


def test_a_start_ends_what_was_logged_of_later_steps(tmp_path):
    for step in (0, 2, 4):
        run_log.append(tmp_path, "val", "base", step, bpb=step)
    run_log.append(tmp_path, "eval", "base", 4, suite="chat", task="Sums", score=1.0)
    run_log.append(tmp_path, "note", "base", 4, text="finished")
    run_log.append(tmp_path, "val", "mid", 4, bpb=9)
    run_log.append(tmp_path, "config", "base", 2, config={})
    run_log.append(tmp_path, "val", "base", 3, bpb=3)
    assert [(r["kind"], r["stage"], r["step"]) for r in run_log.read(tmp_path)] == [
        ("val", "base", 0), ("val", "base", 2), ("val", "mid", 4), ("config", "base", 2), ("val", "base", 3),
    ]  # fmt: skip


FOREIGN = [
    b'{"kind": "note", "stage": "base", "step": 9, "text": "\xe4\xb8', b"7", b"[1, 2]", b"null", b'"text"', b'{"a": 1}',
    b'{"kind": "note", "stage": "base"}', b'{"kind": "note", "stage": "base", "step": "9"}', b"\xff\xfe",
    b'{"kind": "note", "stage": "base", "step": true}', b'{"kind": ["note"], "stage": "base", "step": 9}',
    b'{"kind": "note", "stage": "base", "step": 9, "task": {"a": 1}}', b"[" * 100_000, b"{" * 9, b"\0" * 99,
    b"9" * 9999,
    b'{"kind": "note", "stage": "base", "step": 9, "time": "noon"}', b'{"kind": "config", "stage": 1, "step": 0}',
]  # fmt: skip


def test_lines_that_are_no_records_are_skipped_and_counted(tmp_path, capsys):
    """From processes that died, from file systems that crashed, from other programs, from people."""
    run_log.append(tmp_path, "note", "base", 1, text="before")
    with open(tmp_path / run_log.LOG, "ab") as log:
        log.write(b"\r\n\n".join(FOREIGN))
    run_log.append(tmp_path, "note", "base", 2, text="after")
    for _ in range(2):
        assert [r["text"] for r in run_log.read(tmp_path)] == ["before", "after"]
    zeros = 1  # a line of zeros alone is torn too
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path / run_log.LOG}: {len(FOREIGN) - 1 + zeros} lines are not a record: skipped\n"


def test_a_byte_order_mark_and_zeros_before_a_record_do_no_harm(tmp_path):
    run_log.append(tmp_path, "note", "base", 1, text="first")
    run_log.append(tmp_path, "note", "base", 2, text="second")
    first, second = (tmp_path / run_log.LOG).read_bytes().splitlines()
    (tmp_path / run_log.LOG).write_bytes(b"\xef\xbb\xbf" + first + b"\r\n" + b"\0" * 512 + second + b"\n")
    assert [r["text"] for r in run_log.read(tmp_path)] == ["first", "second"]


def test_a_line_of_100_mb_is_skipped_without_being_kept(tmp_path):
    run_log.append(tmp_path, "note", "base", 1, text="before")
    with open(tmp_path / run_log.LOG, "ab") as log:
        for _ in range(100):
            log.write(b"[" + b"1," * 500_000)
    run_log.append(tmp_path, "note", "base", 2, text="after")
    tracemalloc.start()
    assert [r["text"] for r in run_log.read(tmp_path)] == ["before", "after"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    assert run_log.read(tmp_path) == []
    (tmp_path / run_log.LOG).mkdir()
    with pytest.raises(UserError, match=r"log.jsonl cannot be read \(Is a directory\)"):
        run_log.read(tmp_path)
