"""Conversations from files: the formats that are read, and the conversations that are skipped or refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import tasks
from nanochat_jax.config import UserError
from nanochat_jax.tasks import messages, smoltalk, task_data


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: object) -> dict:
    return {"role": "assistant", "content": text}


GOOD = [user("a"), assistant("b")]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
SYSTEM = {"role": "system", "content": "s"}
PARTS = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]


def load(tmp_path, *lines: object, name: str = "mine.jsonl") -> list:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return [c["messages"] for c in tasks.load(f"customjson:{tmp_path / name}", "train")]


def test_the_formats_that_people_store_conversations_in(tmp_path):
    assert load(
        tmp_path,
        GOOD,
        {"messages": GOOD, "id": 7},
        {"conversations": SHAREGPT},
        {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]},
        {"system": "s", "conversations": SHAREGPT},
        {"system": "", "conversations": SHAREGPT},
        {"conversations": GOOD},
        [SYSTEM, *GOOD],
        [SYSTEM | {"content": " "}, *GOOD],
        [user("a") | {"name": "Ada"}, assistant("b") | {"weight": 1}],
        [user("a"), assistant(PARTS)],
    ) == [
        GOOD, GOOD, GOOD, [SYSTEM, *GOOD], [SYSTEM, *GOOD], GOOD, GOOD, [SYSTEM, *GOOD], GOOD, GOOD,
        [user("a"), assistant(PARTS)],
    ]  # fmt: skip


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\r\n\r\n" + json.dumps({"messages": GOOD})).encode())
    assert [c["messages"] for c in tasks.load(f"customjson:{path}", "train")] == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ({}, r"expected \[\{.*got an object with the keys"),
        ({"instruction": "a", "output": "b"}, "the keys instruction, output"),
        ("7", "got 7"),
        (["a", "b"], "expected"),
        (GOOD[:1], "at least two messages.*got 1"),
        ([SYSTEM], "at least two"),
        ([SYSTEM, GOOD[0]], "at least two"),
        ([], "at least two"),
        (GOOD[::-1], "message 1 is by 'assistant', expected 'user'"),
        ([*GOOD, GOOD[1]], "message 3 is by 'assistant', expected 'user'"),
        ([user("a"), {"role": "bot", "content": "b"}], "message 2 is by 'bot'"),
        ([*GOOD, SYSTEM, assistant("b")], "message 3 is by 'system'"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "b"}]}, "message 2 is by 'function_call'"),
        ([user("a"), assistant("")], "message 2, by the assistant, is empty"),
        ([user("a"), assistant(" \n\t\u3000")], "message 2, by the assistant, is empty"),
        ([user("a"), assistant(None)], "message 2, by the assistant, is empty"),
        ([user("a"), {"role": "assistant"}], "message 2, by the assistant, is empty"),
        ([user("a"), assistant([])], "message 2, by the assistant, is empty"),
        ([user("a"), assistant([{"type": "text", "text": " "}])], "message 2, by the assistant, is empty"),
        ([user("a"), assistant([{"type": "python_output", "text": "2"}])], "message 2, by the assistant, is empty"),
        ([*GOOD, user("c"), assistant("")], "message 4, by the assistant, is empty"),
        ([user(" "), assistant("b")], "message 1, by the user, is empty"),
        ({"conversations": [SHAREGPT[0], {"from": "gpt"}]}, "message 2, by the assistant, is empty"),
        ([user("a"), assistant(7)], "message 2: content must be text, got int"),
        ([user(PARTS), assistant("b")], "message 1: content must be text, got list"),
        ([user("a"), assistant([{"type": "image", "text": "b"}])], "message 2: a part must be"),
        ([user("a"), assistant(None) | {"tool_calls": [{"id": 1}]}], "tool calls are not supported"),
        ([user("a"), assistant("b") | {"weight": 0}], "weight 0 is not supported"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, complaint):
    with pytest.raises(UserError, match=rf"mine\.jsonl:3: .*{complaint}") as caught:
        load(tmp_path, GOOD, "", line, GOOD)
    assert "\n" not in str(caught.value)


def test_further_bad_lines_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"mine\.jsonl:2: message 2.*is empty \(and 2 more bad lines\)"):
        load(tmp_path, GOOD, [user("a"), assistant("")], "{", {})


def test_a_file_that_is_one_array_is_named_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"all\.json:1: one JSON array.*jq -c"):
        load(tmp_path, json.dumps([{"conversations": SHAREGPT}] * 2, indent=1), name="all.json")


def test_a_last_question_without_an_answer_is_left_out_and_counted(tmp_path, capsys):
    assert load(tmp_path, GOOD, [*GOOD, user("c")], [*GOOD, user("c")]) == [GOOD] * 3
    assert "without an answer in 2 conversations, the first is " in (out := capsys.readouterr().out)
    assert "mine.jsonl:2\n" in out


@pytest.mark.parametrize("system", [{"role": "system", "content": None}, {"role": "system"}, {"from": "system"}])
def test_a_system_message_without_text_is_left_out(tmp_path, system):
    assert load(tmp_path, [system, *GOOD], {"messages": [system, *GOOD, user("c")]}) == [GOOD] * 2
    with pytest.raises(UserError, match=r"mine\.jsonl:2: message 1: content must be text, got list"):
        load(tmp_path, GOOD, [{"role": "system", "content": []}, *GOOD])


# -----------------------------------------------------------------------------
# SmolTalk

ROWS = [
    {"messages": GOOD},
    {"messages": [user("nothing?"), assistant("")]},
    {"messages": [SYSTEM, user("c"), assistant("d")]},
    {"messages": [user("c"), assistant("d"), user(" "), assistant("e")]},
    {"messages": [user("c"), assistant("d"), user("bye")]},
]
KEPT = [GOOD, [SYSTEM, user("c"), assistant("d")], [user("c"), assistant("d")]]


def from_hub(tmp_path, rows: list[dict]) -> tasks.Task:
    """SmolTalk as if `rows` were its parquet export: two files of two row groups each."""
    paths = [tmp_path / "0000.parquet", tmp_path / "0001.parquet"]
    for path, part in zip(paths, (rows[:2], rows[2:]), strict=True):
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=2)
    task = smoltalk.SmolTalk.__new__(smoltalk.SmolTalk)
    task.rows = task_data.Shuffled(task_data.ParquetRows(paths, ""))
    task.check()
    return task


def from_folder(tmp_path, rows: list[dict]) -> tasks.Task:
    (tmp_path / "smoltalk").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "smoltalk" / "train.jsonl").write_text(text, encoding="utf-8")
    return tasks.load("smoltalk", "train", data_dir=tmp_path)


@pytest.mark.parametrize(("load", "place"), [(from_hub, "0000.parquet, row 1"), (from_folder, "train.jsonl:2")])
def test_empty_messages_of_smoltalk_are_skipped_and_counted(tmp_path, capsys, load, place):
    task, out = load(tmp_path, ROWS), capsys.readouterr().out
    assert sorted(map(json.dumps, (c["messages"] for c in task))) == sorted(map(json.dumps, KEPT))
    assert "SmolTalk: skipped 2 of 5 conversations because of an empty message, the first is " in out
    assert f"{place} (message 2, by the assistant, is empty)" in out
    assert "without an answer in 1 conversations" in out
    assert all(c.keys() == {"messages"} for c in task), "what was left out does not change the hash of a mixture"


@pytest.mark.parametrize("load", [from_hub, from_folder])
def test_malformed_rows_of_smoltalk_are_refused(tmp_path, load):
    wrong = {"messages": [user("a"), user("b")]}
    with pytest.raises(UserError, match=r"SmolTalk: .*(row 2|jsonl:5): message 2 is by 'user', expected 'assistant'"):
        load(tmp_path, [*ROWS[:4], wrong])


def test_if_nothing_is_left_that_is_an_error(tmp_path):
    with pytest.raises(UserError, match="every conversation has an empty message"):
        from_folder(tmp_path, [ROWS[1]] * 3)


def test_skipping_keeps_the_order_of_the_rest(tmp_path):
    rows = [{"messages": [user(str(i)), assistant("" if i in (3, 8) else "x")]} for i in range(20)]
    task = from_folder(tmp_path, rows)
    kept = [c["messages"][0]["content"] for c in task]
    whole = task_data.Shuffled(task_data.JsonRows([tmp_path / "smoltalk" / "train.jsonl"]))
    assert kept == [c["messages"][0]["content"] for c in whole if c["messages"][1]["content"]] and len(kept) == 18


def test_reading_does_not_change_what_is_valid():
    value = {"messages": [dict(SYSTEM), *map(dict, GOOD)]}
    assert messages.conversation(value) == (value, False)
