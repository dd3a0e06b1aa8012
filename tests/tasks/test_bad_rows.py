"""Rows of scored tasks that cannot be judged, such as hidden labels, are refused at the start, with their place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import tasks
from nanochat_jax.config import UserError
from nanochat_jax.tasks import mmlu, task_data

MMLU = {"question": "Which is hot?", "choices": ["ice", "fire", "snow", "rain"], "answer": 1}
ARC = {"question": "?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
GSM8K = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
HUMANEVAL = {
    "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
    "test": "def check(f):\n    assert f() == 1\n",
}  # fmt: skip


def load(folder, name: str, file: str, rows: list[dict]) -> tasks.Task:
    path = folder / f"{file}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tasks.load(name, "test", data_dir=folder)


@pytest.mark.parametrize(
    ("name", "file", "good", "change", "complaint"),
    [
        ("mmlu", "mmlu/test", MMLU, {"answer": -1}, "the answer is -1, which hides the right answer"),
        ("mmlu", "mmlu/test", MMLU, {"answer": 4}, "the answer is 4, expected the index of one of the 4 choices"),
        ("mmlu", "mmlu/test", MMLU, {"answer": None}, "the answer is None"),
        ("mmlu", "mmlu/test", MMLU, {"answer": True}, "the answer is True"),
        ("mmlu", "mmlu/test", MMLU, {"answer": "B"}, "the answer is 'B'"),
        ("mmlu", "mmlu/test", MMLU, {"choices": []}, "one of the 0 choices"),
        ("mmlu", "mmlu/test", MMLU, {"choices": ["a"] * 5}, "one of the 5 choices"),
        ("mmlu", "mmlu/test", MMLU, {"choices": ["a", 2, "b", "c"]}, "must be text"),
        ("mmlu", "mmlu/test", MMLU, {"question": None}, "must be text"),
        ("arc-easy", "arc/ARC-Easy/test", ARC, {"answerKey": ""}, "the answer '' is not one of the letters A, B"),
        ("arc-easy", "arc/ARC-Easy/test", ARC, {"answerKey": "AB"}, "the answer 'AB' is not one of the letters"),
        ("arc-easy", "arc/ARC-Easy/test", ARC, {"answerKey": "C"}, "the answer 'C' is not one of the letters A, B"),
        ("arc-challenge", "arc/ARC-Challenge/test", ARC, {"answerKey": "1"}, "the answer '1' is not one"),
        ("arc-easy", "arc/ARC-Easy/test", ARC, {"choices": {"text": [], "label": []}}, "2 or more choices"),
        ("arc-easy", "arc/ARC-Easy/test", ARC, {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, "different"),
        (
            "arc-easy",
            "arc/ARC-Easy/test",
            ARC,
            {"choices": {"text": ["a", "b"], "label": "AB"}, "answerKey": "AB"},
            "the answer 'AB' is not one of the letters A, B",
        ),
        (
            "arc-easy",
            "arc/ARC-Easy/test",
            ARC,
            {"choices": {"text": ["a", "b"], "label": [1, 2]}, "answerKey": 1},
            "the letters must be text",
        ),
        ("gsm8k", "gsm8k/test", GSM8K, {"answer": "It is 2."}, r'must end with "#### number", got \.\.\.\'It is 2'),
        ("gsm8k", "gsm8k/test", GSM8K, {"answer": "#### 2 <<1+1=2>>"}, "must end with"),
        ("gsm8k", "gsm8k/test", GSM8K, {"answer": ""}, "must end with"),
        ("gsm8k", "gsm8k/test", GSM8K, {"answer": None}, "fields of this task"),
        ("gsm8k", "gsm8k/test", GSM8K, {"question": ""}, "the question must be text"),
        ("gsm8k-socratic", "gsm8k/test_socratic", GSM8K, {"answer": "?"}, "must end with"),
        ("humaneval", "humaneval/HumanEval", HUMANEVAL, {"test": ""}, "test that defines check"),
        ("humaneval", "humaneval/HumanEval", HUMANEVAL, {"entry_point": ""}, "an entry_point"),
        ("humaneval", "humaneval/HumanEval", HUMANEVAL, {"prompt": None}, "fields of this task"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_with_its_place(tmp_path, name, file, good, change, complaint):
    assert len(load(tmp_path / "good", name, file, [good, good])) == 2
    with pytest.raises(UserError, match=complaint) as caught:
        load(tmp_path / "bad", name, file, [good, good | change, good | change])
    message = str(caught.value)
    assert f"{tmp_path}/bad/{file}.jsonl:2: " in message and "\n" not in message
    assert message.startswith(tasks.task_class(name).name)


def test_rows_from_the_hub_are_named_by_file_and_row(tmp_path):
    paths = [tmp_path / "all" / "test" / f"000{i}.parquet" for i in range(2)]
    paths[0].parent.mkdir(parents=True)
    for path, answers in zip(paths, ([0, 1, 2], [3, -1]), strict=True):
        pq.write_table(pa.Table.from_pylist([MMLU | {"answer": answer} for answer in answers]), path)
    task = mmlu.MMLU.__new__(mmlu.MMLU)
    task.rows = task_data.Shuffled(task_data.ParquetRows(paths, ""))
    with pytest.raises(UserError, match=r"MMLU: .*all/test/0001\.parquet, row 1: the answer is -1"):
        task.check()


def test_a_row_of_the_wrong_shape_or_no_json(tmp_path):
    for i, (line, complaint) in enumerate([('{"broken', "not JSON"), ("7", "fields of this task"), ("[]", "fields")]):
        path = tmp_path / str(i) / "gsm8k" / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(GSM8K) + "\n\n" + line + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"test\.jsonl:3: .*{complaint}"):
            tasks.load("gsm8k", "test", data_dir=tmp_path / str(i))


def test_the_real_data_pass(data_dir):
    for name in ("gsm8k", "arc-easy", "arc-challenge", "humaneval", "mmlu"):
        assert len(tasks.load(name, "test", data_dir=data_dir)) > 100


def test_socratic_is_another_subset_of_gsm8k(tmp_path):
    answer = "How many? ** There are <<1+1=2>>2.\n#### 2"
    task = load(tmp_path, "GSM8K-Socratic", "gsm8k/test_socratic", [GSM8K | {"answer": answer}])
    assert task.name == "GSM8K-Socratic" and task.eval_type == "generative"
    assert task[0]["messages"][1]["content"][0]["text"] == "How many? ** There are "
    assert task.evaluate(task[0], "#### 2") and not task.evaluate(task[0], "#### 3")
