"""The log of a run."""

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
