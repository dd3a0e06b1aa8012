"""The log of a run."""

import json

from nanochat_jax import run_log


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
