"""Tasks: the specification's formats, disjoint splits, right answers, and clear errors if data are missing."""

import gzip
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import tasks
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.tasks import spellingbee, task_data, words
from nanochat_jax.tasks.gsm8k import GSM8K, extract_answer

# -----------------------------------------------------------------------------
# Formats of the specification


@pytest.mark.golden
@pytest.mark.parametrize(
    ("key", "name", "file"),
    [
        ("gsm8k_train", "gsm8k", "gsm8k/train"),
        ("gsm8k_test", "gsm8k", "gsm8k/test"),
        ("mmlu_test", "mmlu", "mmlu/test"),
        ("arc_easy_test", "arc-easy", "arc/ARC-Easy/test"),
        ("arc_challenge_train", "arc-challenge", "arc/ARC-Challenge/train"),
        ("humaneval_test", "humaneval", "humaneval/HumanEval"),
    ],
)
def test_conversations_equal_the_recorded_ones(golden_dir, data_dir, key, name, file):
    rows = task_data.JsonRows([task_data.find(data_dir / f"{file}.jsonl")])
    for recorded in json.loads((golden_dir / "tasks.json").read_text(encoding="utf-8"))["tasks"][key]:
        conversation = tasks.TASKS[name].conversation(rows[recorded["row"]])
        assert conversation["messages"] == recorded["messages"]
        assert conversation.get("letters") == recorded.get("letters")


@pytest.mark.golden
def test_extracted_answers_equal_the_recorded_ones(golden_dir):
    for case in json.loads((golden_dir / "tasks.json").read_text(encoding="utf-8"))["gsm8k_extract"]:
        assert extract_answer(case["text"]) == case["answer"]


RIGHT = r"""$18 | 18 dollars | 18.00 | 18. | **18** | \boxed{18} | $\boxed{18}$ | \$18 | 18% | 18 percent | `18` | = 18
    | **$18.00** | $18.00. | +18 | £18 | $018 | 18.0 eggs per day | 18.50 km/h"""
WRONG = r"""17 | $17 | $18.5 | -18 | $-18 | - 18 | $18 and $2 | **18** or **19** | $18 - 2 | $18$19 | 1 8 | $18 thousand
    | $18k | $18 million | $18 cents | $18½ | $18² | 1.8e1 | $18.0.0 | $18,00 | $1,8 | x = 18 | not 18 | $ | ten"""


def gsm8k_problem(answer: str) -> dict:
    return GSM8K.conversation({"question": "?", "answer": f"It is so.\n#### {answer}"})


def test_the_reward_takes_a_right_number_in_another_format_and_the_score_does_not():
    """No wrong number, no second number and no word that changes the number is rewarded."""
    task = GSM8K.__new__(GSM8K)

    def judged(answer: str, completion: str) -> tuple[bool, float]:
        problem = gsm8k_problem(answer)
        return task.evaluate(problem, completion), task.reward(problem, completion)

    for text in map(str.strip, RIGHT.split("|")):
        expected = "18.5" if "18.50" in text else "18"
        assert judged(expected, f"so\n#### {text}")[1] == 1.0, text
    for text in map(str.strip, WRONG.split("|")):
        assert judged("18", f"so\n#### {text}") == (False, 0.0), text
    assert judged("18", "#### $18") == judged("18", "#### 18.0") == judged("18", "####18") == (False, 1.0)
    assert judged("18", "#### 18") == judged("18", "#### 18 dollars") == (True, 1.0)
    for text in ("\u22121,234.5", "-$1234.50", "$-1,234.5"):
        assert judged("-1,234.5", f"#### {text}") == (False, 1.0)
        assert judged("1,234.5", f"#### {text}") == (False, 0.0)
    assert judged("18", "#### $17\n#### $18") == judged("18", "It is $18") == (False, 0.0)


@pytest.mark.parametrize("name", ["Sums", "TwoStep", "SpellingBee"])
def test_every_task_with_a_number_rewards_it_in_another_format(name, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "words_alpha.txt").write_text("\n".join(f"word{i}" for i in range(200)))
    mixture = tasks.mixture({name: 5}, "train", tmp_path)
    for problem in mixture:
        number = problem["messages"][1]["content"][-1]["text"].split("#### ")[1]
        dollars = f"#### ${number}.00"
        assert not mixture.evaluate(problem, dollars) and mixture.reward(problem, dollars) == 1
        assert mixture.reward(problem, f"#### ${number}1") == 0


def test_gsm8k_compares_the_text_after_the_mark():
    conversation = GSM8K.conversation({"question": "?", "answer": "It is <<2*5=10>>10, or <<3*4==12>>\n#### 1,010"})
    assert [part["text"] for part in conversation["messages"][1]["content"]] == [
        "It is ",
        "2*5",
        "10",
        "10, or ",
        "3*4=",
        "12",
        "\n#### 1,010",
    ]
    task = GSM8K.__new__(GSM8K)
    assert task.evaluate(conversation, "so\n#### 1010") and task.reward(conversation, "#### 1,010") == 1.0
    for wrong in ("1010", "#### 1010.0", "#### 1011 #### 1010", "####1010", ""):
        assert not task.evaluate(conversation, wrong)


def test_rows_come_in_the_permutation_of_seed_42(data_dir):
    task = tasks.load("GSM8K", "test", data_dir=data_dir)
    rows = task_data.JsonRows([data_dir / "gsm8k" / "test.jsonl.gz"])
    order = np.random.default_rng(42).permutation(1319)
    assert [task[i] for i in range(20)] == [GSM8K.conversation(rows[int(order[i])]) for i in range(20)]


def test_sizes_of_the_real_data(data_dir):
    sizes = {"gsm8k": 1319, "mmlu": 14042, "arc-easy": 2376, "arc-challenge": 1172, "humaneval": 164}
    assert {name: len(tasks.load(name, "test", data_dir=data_dir)) for name in sizes} == sizes
    assert len(tasks.load("mmlu", "train", data_dir=data_dir)) == 4957 + 9741  # mc_train is used instead


def test_val_is_the_test_split_where_there_is_no_other(data_dir):
    for name in ("gsm8k", "humaneval", "spellingbee", "smoltalk"):
        val, test = (tasks.load(name, split, data_dir=data_dir) for split in ("val", "test"))
        assert len(val) == len(test) and val[3] == test[3] and val.split == val[:3].split == "test"
    for name in ("sums", "twostep", "choice", "identity"):
        val, test = (tasks.load(name, split) for split in ("val", "test"))
        assert len(val) == len(test) and val[3] != test[3]
        assert (val.split, tasks.load(name, "val", rows=5).split, test.split) == ("val", "val", "test")


def test_categorical_answers_are_one_of_the_letters(data_dir):
    for name, split in (("mmlu", "train"), ("arc-easy", "train"), ("ARC-Challenge", "test"), ("choice", "test")):
        task = tasks.load(name, split, data_dir=data_dir, rows=500)
        assert task.eval_type == "categorical" and task.baseline == 0.25
        for conversation in task:
            user, answer = (message["content"] for message in conversation["messages"])
            assert answer in conversation["letters"] and f"={answer}\n" in user
            assert task.evaluate(conversation, answer) and not task.evaluate(conversation, "no")


# -----------------------------------------------------------------------------
# Slices, repetitions, mixtures


def test_slices_end_where_the_task_ends():
    task = tasks.load("sums", "test")
    assert len(task[990:5000]) == 10 and len(task[2000:3000]) == 0 and len(task[10:0]) == 0
    assert len(task[1:10:4]) == 3 and task[1:10:4][2] == task[9]
    assert task[5:100][3:10][0] == task[8] and task[-1] == task[999]
    assert [c for c in task[:3]] == [task[0], task[1], task[2]]
    for index in (1000, -1001):
        with pytest.raises(IndexError, match="1000 rows"):
            task[index]
    assert task[:3].eval_type == "generative" and task[:3].evaluate(task[0], "#### x") is False


def test_rows_truncates_and_repeats():
    task = tasks.load("identity", "test")
    assert len(tasks.load("identity", "test", rows=7)) == 7
    twice = tasks.load("identity", "test", rows=2 * len(task) + 1)
    assert len(twice) == 2 * len(task) + 1 and twice[len(task) + 3] == task[3] and twice[2 * len(task)] == task[0]


def test_mixtures_are_shuffled_once_and_deterministic():
    counts = {"sums": 50, "choice": 30, "identity": 20}
    first, second = (tasks.mixture(counts, "train") for _ in range(2))
    assert len(first) == 100 and [first[i] for i in range(100)] == [second[i] for i in range(100)]
    assert Counter(c["task"] for c in first) == {0: 50, 1: 30, 2: 20}
    # The order is Random(42)'s shuffle of the concatenation, as the specification has it.
    expected = list(range(100))
    random.Random(42).shuffle(expected)
    assert first.order == expected
    assert tasks.mixture(counts, "train", seed=1).order != expected
    reward = tasks.mixture({"sums": 3, "twostep": 3}, "train")
    for conversation in reward:
        assert reward.reward(conversation, conversation["messages"][1]["content"][-1]["text"]) == 1.0


def test_a_sequence_is_one_task_after_the_other():
    sequence = tasks.mixture({"sums": 20, "choice": 10, "twostep": 5}, "train", seed=None)
    assert [c["task"] for c in sequence] == [0] * 20 + [1] * 10 + [2] * 5
    choice = tasks.load("choice", "train")
    assert [c["messages"] for c in sequence[20:30]] == [choice[i]["messages"] for i in range(10)]
    assert sequence.describe() == "Sums 20, Choice 10, TwoStep 5"


def test_rows_that_repeat_are_announced(capsys):
    tasks.load("identity", "test", rows=7)
    assert "repeated" not in capsys.readouterr().out
    own = len(tasks.load("identity", "test"))
    tasks.load("identity", "test", rows=own + 5)
    assert f"Identity: {own + 5:,} rows asked for, {own} here: rows are repeated\n" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Spelling


def test_spelling_words_are_disjoint_and_answers_right(data_dir):
    train, test = (tasks.load("spellingbee", split, data_dir=data_dir) for split in ("train", "test"))
    assert not set(train.words) & set(test.words) and len(train) == 80_000 and len(test) == 256
    assert len(train.words) + len(test.words) == 370_099
    for conversation in test:
        parts = conversation["messages"][1]["content"]
        assert use_calculator(parts[2]["text"]) == parts[3]["text"] == extract_answer(parts[4]["text"])
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", parts[2]["text"]).groups()
        assert f"{word}:{','.join(word)}" in parts[0]["text"] and words.held_out(word)
        assert parts[0]["text"].count(" hit! count=") == word.count(letter)
        assert test.evaluate(conversation, "".join(part["text"] for part in parts))
        assert word in conversation["messages"][0]["content"] and letter in conversation["messages"][0]["content"]
    spelling = tasks.load("simplespelling", "train", data_dir=data_dir)
    assert len({spelling[i]["messages"][0]["content"] for i in range(1000)}) == 1000
    assert spelling.evaluate(spelling[0], spellingbee.spell(spelling.words[0]))


def test_words_come_from_the_corpus_and_stay(own_base_dir):
    corpus = own_base_dir / "data" / "local"
    corpus.mkdir(parents=True)
    rare = "unlikely_name othername.attribute foo_bar x1y Capital http://example.org/path ab verylongwordindeed"
    text = " ".join(f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26)) + " the the " + rare
    pq.write_table(pa.table({"text": [text, None, text]}), corpus / "train_00000.parquet")
    pq.write_table(pa.table({"text": [text]}), corpus / "val_00000.parquet")
    (corpus / "manifest.json").write_text('{"source": "local", "hash": "0"}')
    found = words.load("train") + words.load("test")
    assert len(found) == 677 and found[0] == "the" and "wordaa" in found and "name" not in found
    words._all_words.cache_clear()
    shutil.rmtree(corpus)
    assert words.load("train") + words.load("test") == found
    assert len(tasks.load("spellingbee", "test")) == 256


def test_no_words_is_an_error_not_an_empty_task():
    with pytest.raises(UserError, match="--task_data_dir"):
        tasks.load("spellingbee", "train")


# -----------------------------------------------------------------------------
# Conversations from files


def test_smoltalk_from_a_folder_of_conversations(data_dir):
    train, test = (tasks.load("smoltalk", split, data_dir=data_dir) for split in ("train", "test"))
    assert len(train) + len(test) == 2156 + 1923 + 4535 and len(test) > 200 and train.eval_type is None
    openings = [{c["messages"][0]["content"] for c in task} for task in (train, test)]
    assert not openings[0] & openings[1]


def chat_files(folder: Path, **rows: int) -> set[str]:
    """Writes files of conversations into folder/chat. Returns the questions in the last file."""
    (folder / "chat").mkdir(parents=True, exist_ok=True)
    questions = []
    for stem, count in rows.items():
        questions = [f"{stem} {i}?" for i in range(count)]
        lines = [json.dumps([{"role": "user", "content": q}, {"role": "assistant", "content": "a"}]) for q in questions]
        (folder / "chat" / f"{stem}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return set(questions)


def questions_of(folder: Path, split: str) -> set[str]:
    return {c["messages"][0]["content"] for c in tasks.load("smoltalk", split, data_dir=folder)}


@pytest.mark.parametrize("name", ["test", "my_val", "dev", "eval-set"])
def test_a_file_of_conversations_that_is_named_as_held_out_is_never_trained_on(name, tmp_path, capsys):
    chat_files(tmp_path, train=300, more=20)
    held_out = chat_files(tmp_path, **{name: 200})
    assert questions_of(tmp_path, "train") == {f"train {i}?" for i in range(300)} | {f"more {i}?" for i in range(20)}
    assert questions_of(tmp_path, "val") == questions_of(tmp_path, "test") == held_out
    out = capsys.readouterr().out
    said = f"SmolTalk: conversations: {tmp_path}/chat\n  training: more.jsonl, train.jsonl\n  test: {name}.jsonl\n"
    assert said in out and out.count("SmolTalk: conversations") == 1


def test_conversations_that_are_not_read_are_named(tmp_path, capsys):
    chat_files(tmp_path, a=300)
    for name in ("more.parquet", "extra.json", "c.jsonl.xz", "a.jsonl.gz", ".hidden"):
        (tmp_path / "chat" / name).write_bytes(b"")
    (tmp_path / "chat" / "deep").mkdir()
    (tmp_path / "chat" / "deep" / "b.jsonl").write_bytes(b"")
    train, test = questions_of(tmp_path, "train"), questions_of(tmp_path, "test")
    assert len(train | test) == 300 and not train & test and test
    out = capsys.readouterr().out
    assert (
        "  test: 1 in 20 conversations, by a hash of their first message (no file is named val, dev, eval or test)\n"
        "  not read: c.jsonl.xz, extra.json, more.parquet (only .jsonl and .jsonl.gz are read); deep/b.jsonl (in a "
        "subfolder); a.jsonl.gz (a compressed copy of a file that is read)\n"
    ) in out

    chat_files(tmp_path, test=5, val=7)
    assert questions_of(tmp_path, "test") == {f"val {i}?" for i in range(7)}
    assert "test.jsonl (held out; the files named val are the test)\n" in capsys.readouterr().out


def test_folders_of_conversations_that_cannot_work(tmp_path, capsys):
    with pytest.raises(UserError, match=r"needs chat/\*\.jsonl\[\.gz\] or smoltalk/train\.jsonl"):
        questions_of(tmp_path, "train")
    with pytest.raises(UserError, match=r"--task_data_dir=.*nowhere: no such folder"):
        tasks.load("identity", "train", data_dir=tmp_path / "nowhere")
    chat_files(tmp_path / "held", test=5)
    with pytest.raises(UserError, match=r"no training files, since a held-out file is never one: test\.jsonl"):
        questions_of(tmp_path / "held", "train")
    (tmp_path / "other" / "chat").mkdir(parents=True)
    (tmp_path / "other" / "chat" / "a.csv").write_bytes(b"")
    with pytest.raises(UserError, match=r"no files ending in \.jsonl or \.jsonl\.gz; not read: a\.csv"):
        questions_of(tmp_path / "other", "train")

    chat_files(tmp_path / "copy", train=5)
    shutil.copy(tmp_path / "copy" / "chat" / "train.jsonl", tmp_path / "copy" / "chat" / "test.jsonl")
    with pytest.raises(UserError, match=r"chat/test\.jsonl is a copy of train\.jsonl: hold out other conversations"):
        questions_of(tmp_path / "copy", "train")

    # If smoltalk/ lacks a split, chat/ does not provide it.
    chat_files(_chat(tmp_path), a=300)
    assert questions_of(tmp_path, "train") == {"a"}
    assert f"reading {tmp_path}/smoltalk, not {tmp_path}/chat\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"needs smoltalk/test\.jsonl"):
        questions_of(tmp_path, "test")


def test_half_of_mc_train_is_announced(tmp_path, capsys):
    row = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "mc_train").mkdir()
    (tmp_path / "mc_train" / "openbook_qa_train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert len(tasks.load("mmlu", "train", data_dir=tmp_path)) == 1
    assert f"reading only {tmp_path}/mc_train/openbook_qa_train.jsonl, since" in capsys.readouterr().out


def test_files_that_no_task_reads_are_named_once(tmp_path, capsys):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    row = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n"
    for name in ("train.jsonl", "test.jsonl.gz", "train2.jsonl", "more.parquet", "README.md", ".hidden.jsonl"):
        (folder / name).write_bytes(gzip.compress(row.encode()) if name.endswith(".gz") else row.encode())
    for _ in range(2):
        assert len(tasks.load("gsm8k", "train", data_dir=tmp_path)) == 1
    expected = f"not read in {folder}: more.parquet, train2.jsonl (the task reads train.jsonl[.gz])\n"
    assert capsys.readouterr().out == expected


def test_unicode_line_separators_do_not_split_a_row(tmp_path):
    messages = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "ü\x0b"}]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(messages, ensure_ascii=False) + "\n\n", encoding="utf-8")
    task = tasks.load(f"CustomJSON:{path}", "train", rows=3)
    assert len(task) == 3 and task[2]["messages"] == messages


GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_what_the_user_can_get_wrong_is_one_line(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    for name, split, complaint in [
        ("gsm9k", "test", r"unknown task 'gsm9k': must be one of MMLU, .*; did you mean gsm8k\?"),
        ("poetry", "test", "unknown task 'poetry': must be one of MMLU, ARC-Easy"),
        ("gsm8k", "dev", "must be train, val or test"),
        ("gsm8k", "train", "empty"),
        ("mmlu", "test", r"mmlu/test\.jsonl"),
        ("humaneval", "train", "no train split"),
        ("customjson", "train", "customjson:PATH"),
        (f"customjson:{tmp_path}/none.jsonl", "train", "no such file"),
        (f"customjson:{tmp_path}/empty.jsonl", "train", r"empty\.jsonl: empty; write JSON lines into it"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            tasks.load(name, split, data_dir=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="empty mixture"):
        tasks.mixture({}, "train")
    with pytest.raises(UserError, match="sums and Sums are the same task"):
        tasks.mixture({"sums": 1, "Sums": 2}, "train")
    with pytest.raises(UserError, match="number of rows"):
        tasks.load("sums", "train", rows=-1)
    with pytest.raises(NotImplementedError, match="for training only"):
        tasks.load("smoltalk", "train", data_dir=_chat(tmp_path)).evaluate({}, "")


def _chat(folder: Path) -> Path:
    (folder / "smoltalk").mkdir()
    (folder / "smoltalk" / "train.jsonl").write_text(json.dumps({"messages": GOOD}) + "\n", encoding="utf-8")
    return folder


# -----------------------------------------------------------------------------
# The hub, simulated by a local server


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as downloading one parquet file needs."""

    file = b""
    requested: list[str] = []  # noqa: RUF012
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        Hub.requested.append(self.path)
        if self.path.startswith("/api/datasets/openai/gsm8k"):
            names = ["README.md", "main/test/0000.parquet", "socratic/test/0000.parquet"]
            body = {"id": "openai/gsm8k", "sha": self.sha, "siblings": [{"rfilename": name} for name in names]}
            self.answer(json.dumps(body).encode(), "application/json")
        elif self.path == f"/datasets/openai/gsm8k/resolve/{self.sha}/main/test/0000.parquet":
            self.answer(self.file, "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes, kind: str):
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "ETag": '"abc"',
            "X-Repo-Commit": self.sha,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def ask_hub(endpoint: str, base: Path, name: str = "gsm8k", split: str = "test") -> subprocess.CompletedProcess:
    """Loads a task in a separate process, because huggingface_hub reads its endpoint at import."""
    code = f"""
from nanochat_jax import tasks
try:
    task = tasks.load({name!r}, {split!r})
    print(len(task), task[0]["messages"][0]["content"])
except ValueError as error:
    print("UserError:", error)
"""
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(base / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90, cwd=REPOSITORY
    )


def test_the_hub_is_asked_once(own_base_dir, tmp_path):
    rows = [{"question": f"question {i}", "answer": f"#### {i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gsm8k.parquet")
    Hub.file = (tmp_path / "gsm8k.parquet").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = ask_hub(endpoint, own_base_dir)
        expected = f"5 question {np.random.default_rng(42).permutation(5)[0]}"
        assert first.stdout.splitlines()[-1] == expected, first.stderr[-2000:]
        count = len(Hub.requested)
        again = ask_hub(endpoint, own_base_dir)
        assert again.stdout.splitlines() == [expected] and len(Hub.requested) == count
        other = ask_hub(endpoint, own_base_dir, split="train")
        assert "no main/train" in other.stdout and "--task_data_dir" in other.stdout
        unknown = ask_hub(endpoint, own_base_dir, name="mmlu")
        assert "UserError: cannot download cais/mmlu" in unknown.stdout and "--task_data_dir" in unknown.stdout
    finally:
        server.shutdown()
        server.server_close()


def test_a_damaged_download_is_named_with_the_way_out(own_base_dir):
    folder = own_base_dir / "task_data" / "openai--gsm8k"
    (folder / "main" / "test").mkdir(parents=True)
    marker, data = folder / "main-test.json", folder / "main" / "test" / "0000.parquet"
    whole = json.dumps({"repo": "openai/gsm8k", "revision": "0", "files": ["main/test/0000.parquet"]})
    for text in (whole[:40], "", "[]", '{"files": []}', '{"files": [3]}'):
        marker.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"^{marker} is damaged: delete it, and the data are downloaded again$"):
            tasks.load("gsm8k", "test")
    marker.write_text(whole, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{data} is missing: delete {marker}, and it is downloaded again$"):
        tasks.load("gsm8k", "test")
    data.write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=rf"^{data}: cannot be read \(.*\): delete it and {marker}") as caught:
        tasks.load("gsm8k", "test")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line_naming_the_way_out(own_base_dir):
    run = ask_hub("http://127.0.0.1:9", own_base_dir)
    assert run.stdout.startswith("UserError: cannot download openai/gsm8k") and run.stdout.count("\n") == 1
    assert "--task_data_dir" in run.stdout and run.returncode == 0
