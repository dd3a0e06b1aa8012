"""Scores of chat tasks: equal to those of a plain loop however they are batched, with clear errors."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from serving import save_model

from nanochat_jax import checkpoint, config, run_log, tasks
from nanochat_jax.config import REPOSITORY, GPTConfig, UserError
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.evals import chat
from nanochat_jax.evals.chat import Sampling
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.model import gpt
from nanochat_jax.tasks import multiple_choice
from nanochat_jax.tokenizer import Tokenizer
from scripts import chat_eval

TEXT = "Multiple Choice question: which one is it? Respond only with the letter of the correct answer. A B C D"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(50)], 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    model_cfg = GPTConfig(
        n_layer=1, n_head=2, n_kv_head=1, n_embd=32, vocab_size=tokenizer.vocab_size, sequence_len=128
    )
    params = tiny.random_params(model_cfg, 0.3)
    return EvalModel(params, model_cfg, tokenizer)


class Quiz(tasks.Task):
    """Questions of different lengths with two to five choices, some with letters that are digits."""

    name, eval_type, baseline = "Quiz", "categorical", 0.25

    def __len__(self):
        return 30

    def example(self, index):
        rng = random.Random(index)
        letters = ["A", "B", "C", "D", "E"] if index % 3 else ["1", "2", "3", "4"]
        letters = letters[: 2 + index % 4]
        choices = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in letters]
        return multiple_choice.conversation(" ".join(rng.choices(WORDS, k=3)), choices, letters, rng.choice(letters))

    def evaluate(self, conversation, completion):
        return multiple_choice.evaluate(conversation, completion)


class Begin(tasks.Task):
    """Right if the answer's first character has an even code point."""

    name, eval_type = "Begin", "generative"

    def __len__(self):
        return 12

    def example(self, index):
        words = " ".join(WORDS[: index % 5 + 1])
        return {"messages": [{"role": "user", "content": f"{words} {index}"}, {"role": "assistant", "content": "?"}]}

    def evaluate(self, conversation, completion):
        return bool(completion) and ord(completion[0]) % 2 == 0


def test_choices_equal_a_plain_loop_however_batched(model, tokenizer):
    forward = jax.jit(lambda p, i: gpt.forward(p, model.model_cfg, i))
    right, task = [], Quiz()
    for i in range(len(task)):
        ids = tokenizer.render_for_completion(task[i])
        row = np.zeros((1, model.model_cfg.sequence_len), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(forward(model.params, row))[0, len(ids) - 1]
        letters = task[i]["letters"]
        best = max(letters, key=lambda letter: logits[tokenizer.encode(letter)[0]])
        right.append(best == task[i]["messages"][-1]["content"])
    for batch_size in (4, 64):
        score = chat.evaluate(model, task, batch_size=batch_size)
        assert [answer["right"] for answer in score.answers] == right
    assert 0 < sum(right) < 30 and score.n == 30 and score.truncated is None
    assert score.score == pytest.approx(np.mean(right))
    assert score.stderr == pytest.approx(np.std(right) / 30**0.5)
    assert score.centered == pytest.approx((np.mean(right) - 0.25) / 0.75)


def test_letters_that_share_their_first_token(model, tokenizer):
    class Same(Quiz):
        def example(self, index):
            return multiple_choice.conversation("?", ["one", "two"], ["A", "AA"], "A")

    assert tokenizer.encode("AA")[0] == tokenizer.encode("A")[0]
    with pytest.raises(UserError, match="A, AA cannot be told apart"):
        chat.evaluate(model, Same())


def test_generated_answers_are_checked(model, tokenizer):
    task = Begin()
    score = chat.evaluate(model, task, Sampling(max_new_tokens=4), slots=5)
    engine = Engine(model.params, model.model_cfg, tokenizer, slots=1)
    for i, answer in enumerate(score.answers):
        ids = tokenizer.render_for_completion(task[i])
        [[sample]] = engine.run([Request(ids, max_tokens=4, temperature=0.0)])
        text = tokenizer.decode(sample.ids[:-1] if sample.finish_reason == "stop" else sample.ids)
        assert answer["answers"] == [text] and answer["finish_reasons"] == [sample.finish_reason]
        assert answer["right"] == task.evaluate(None, text)
    lengths = [answer["finish_reasons"] == ["length"] for answer in score.answers]
    assert score.n == 12 and score.truncated == pytest.approx(np.mean(lengths))


def test_one_right_sample_is_a_pass(model, tokenizer):
    sampling = Sampling(max_new_tokens=3, temperature=1.5, top_k=0, num_samples=6)
    many = chat.evaluate(model, Begin(), sampling, slots=8)
    again = chat.evaluate(model, Begin(), sampling, slots=8)
    other = chat.evaluate(model, Begin(), dataclasses.replace(sampling, seed=1), slots=8)
    assert many.answers == again.answers != other.answers
    for answer in many.answers:
        assert len(answer["answers"]) == 6
        assert answer["right"] == any(Begin().evaluate(None, text) for text in answer["answers"])


def test_max_problems_and_prompts_beyond_the_context(model, tokenizer):
    class Long(Begin):
        def example(self, index):
            return {"messages": [{"role": "user", "content": "letter " * 500}, {"role": "assistant", "content": "?"}]}

    assert chat.evaluate(model, Begin(), Sampling(max_new_tokens=2), max_problems=3).n == 3
    assert chat.evaluate(model, Begin(), Sampling(max_new_tokens=2), max_problems=99).n == 12
    short = chat.evaluate(model, Begin(), Sampling(max_new_tokens=2))
    assert short.cut == 0 and not any("cut" in note for note in short.notes)
    long = chat.evaluate(model, Long(), Sampling(max_new_tokens=4, temperature=1.0, num_samples=3), max_problems=2)
    stopped = sum(reason == "length" for answer in long.answers for reason in answer["finish_reasons"])
    assert long.cut == 2 and long.truncated == stopped / 6 and [answer["cut"] for answer in long.answers] == [True] * 2
    notes = [f"{stopped} of 6 answers stopped at the limit"] * (stopped > 0) + ["2 of 2 prompts cut to the context"]
    assert long.notes == notes

    class LongQuiz(Quiz):
        def example(self, index):
            question = "which " * (500 if index < 4 else 1)
            return multiple_choice.conversation(question, ["one", "two"], ["A", "B"], "A")

    quiz = chat.evaluate(model, LongQuiz(), max_problems=10)
    assert quiz.cut == 4 and "4 of 10 prompts cut to the context" in quiz.notes


def test_ties_between_letters_are_counted(model):
    """A model that was never trained finds every token equally likely. Then its score is the share of As."""
    even = dataclasses.replace(model, params=model.params | {"lm_head": model.params["lm_head"] * 0})
    quiz = chat.evaluate(even, Quiz())
    assert quiz.ties == 30 and quiz.notes == ["30 ties between letters went to the first"]
    assert {answer["answer"] for answer in quiz.answers} == {"A", "1"}
    assert chat.evaluate(model, Quiz()).ties == 0


def test_a_model_that_computes_nothing_has_no_score(model):
    broken = dataclasses.replace(model, params=model.params | {"wte": model.params["wte"] * np.nan})
    with pytest.raises(UserError, match=r"Quiz: the model's losses are not finite: .*--step"):
        chat.evaluate(broken, Quiz())
    with pytest.raises(UserError, match=r"Begin: the model's losses are not finite"):
        chat.evaluate(broken, Begin(), Sampling(max_new_tokens=2), max_problems=2)


def test_a_task_for_training_is_refused(model, tokenizer):
    class Training(Begin):
        name, eval_type = "Training", None

    with pytest.raises(UserError, match="Training: for training only"):
        chat.evaluate(model, Training())


def test_hidden_labels_are_refused_before_anything_is_evaluated(own_base_dir, model, tokenizer, tmp_path):
    rows = [{"question": "?", "choices": ["a", "b", "c", "d"], "answer": answer} for answer in (0, 1, -1)]
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    cfg = config.ChatEval(source="sft", task_name="Sums|MMLU", task_data_dir=str(tmp_path), device_type="cpu")
    with pytest.raises(UserError, match=r"MMLU: .*mmlu/test\.jsonl:3: the answer is -1, which hides the right answer"):
        chat_eval.main(cfg)
    assert not (own_base_dir / "chat_eval").exists()
    assert not [r for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r["kind"] == "eval"]


def test_chatcore_needs_all_six_tasks():
    def score(task, value, baseline, n=100):
        return chat.ChatScore(task, value, n, baseline, 1.0, 0, None, [])

    scores = [score(t, 0.4, 0.25 if i < 3 else 0.0) for i, t in enumerate(chat.CHATCORE_TASKS)]
    value, stderr = chat.chat_core(scores)
    assert value == pytest.approx((3 * 0.2 + 3 * 0.4) / 6)
    assert stderr == pytest.approx((3 * (0.24 / 100) / 0.75**2 + 3 * 0.24 / 100) ** 0.5 / 6)
    assert chat.chat_core(scores[1:]) is None
    assert {tasks.task_class(name).name for name in chat.CHATCORE_TASKS} == set(chat.CHATCORE_TASKS)
    for name in chat.CHATCORE_TASKS:
        assert tasks.task_class(name).baseline == (0.25 if tasks.task_class(name).eval_type == "categorical" else 0)


def test_scores_and_answers_of_a_split_stand_beside_those_of_another(own_base_dir, model, tokenizer, tmp_path, capsys):
    """A task without a val split gives test problems when asked for val, and its score says so."""
    words = tmp_path / "data" / "words" / "words_alpha.txt"
    words.parent.mkdir(parents=True)
    words.write_text("\n".join(f"word{i}" for i in range(200)))
    save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    cfg = config.ChatEval(
        source="sft",
        task_name="Sums|SpellingBee",
        max_problems=3,
        max_new_tokens=2,
        task_data_dir=str(tmp_path / "data"),
        device_type="cpu",
    )
    chat_eval.main(cfg)
    tested = {p.name: p.read_text() for p in (own_base_dir / "chat_eval").glob("*/*")}
    chat_eval.main(dataclasses.replace(cfg, split="val"))
    records = [r for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r["kind"] == "eval"]
    evaluated = sorted((r["task"], r["split"]) for r in records)
    assert evaluated == [("SpellingBee", "test"), ("Sums", "test"), ("Sums", "val")]
    assert {r["suite"] for r in records} == {"chat"}
    answers = {p.name: p.read_text() for p in (own_base_dir / "chat_eval").glob("*/*")}
    assert "no val split, evaluated on test: SpellingBee\n" in capsys.readouterr().out
    limits = "max_new_tokens2.jsonl"
    assert tested.keys() == {f"Sums-first3-{limits}", f"SpellingBee-first3-{limits}"}
    assert answers.keys() - tested.keys() == {f"Sums-val-first3-{limits}"} and answers.items() > tested.items()


def test_the_words_are_those_of_training_unless_the_flag_is_given(own_base_dir, model, tokenizer, monkeypatch, capsys):
    save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    asked, meta = [], checkpoint.read_meta(own_base_dir / "sft_checkpoints" / "tiny", 7)
    monkeypatch.setattr(tasks, "load", lambda name, split, **options: asked.append(options["task_files"]) or 1 / 0)
    cfg = config.ChatEval(source="sft", task_name="SpellingBee", device_type="cpu")
    for trained, given, printed in (
        ({"config": {"task_files": "published"}}, "", "--task_files=published, as in training\n"),
        ({"config": {"mixture": {}}}, "", "--task_files=generated, since training did not set it\n"),
        ({"config": {"task_files": "published"}}, "generated", ""),
    ):
        monkeypatch.setattr(checkpoint, "read_meta", lambda run, step, changed=trained: meta | changed)
        with pytest.raises(ZeroDivisionError):
            chat_eval.main(dataclasses.replace(cfg, task_files=given))
        out = capsys.readouterr().out
        assert printed in out and ("--task_files" in out) == bool(printed)
    assert asked == ["published", "generated", "generated"]


def test_a_small_run_replaces_no_answers_of_the_whole(own_base_dir, model, tokenizer, monkeypatch, capsys):
    """Every setting that changes the answers is in the name of their file, and in the key of their record."""
    monkeypatch.setattr(tasks.arithmetic, "HELD_OUT_ROWS", 6)
    save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    cfg = config.ChatEval(source="sft", task_name="Sums", device_type="cpu", slots=8)
    folder, kept = own_base_dir / "chat_eval" / "sft_tiny_000007", {}
    for changes, name in (
        ({}, "Sums"),
        ({"max_problems": 6}, "Sums"),  # all of them
        ({"max_problems": 2}, "Sums-first2"),
        ({"max_new_tokens": 3}, "Sums-max_new_tokens3"),
        ({"temperature": 1.0, "num_samples": 2, "max_new_tokens": 3}, "Sums-num_samples2-temperature1-max_new_tokens3"),
        ({"temperature": 1.0, "seed": 7, "top_k": 5}, "Sums-temperature1-top_k5-seed7"),
    ):
        chat_eval.main(dataclasses.replace(cfg, **changes))
        files = {path.name: path.read_text() for path in folder.iterdir()}
        assert files.items() >= kept.items() and files.keys() == kept.keys() | {f"{name}.jsonl"}
        assert files[f"{name}.jsonl"].count("\n") == changes.get("max_problems", 6)
        kept = files
    records = [r for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r["kind"] == "eval"]
    assert len(records) == 5 and records[-1].items() >= {"seed": 7, "top_k": 5, "temperature": 1.0, "n": 6}.items()


def test_the_settings_and_what_is_missing_are_printed(own_base_dir, model, tokenizer, capsys):
    # Two of the first five problems have more than 100 tokens.
    save_model(own_base_dir, model.params, dataclasses.replace(model.model_cfg, sequence_len=100), tokenizer)
    cfg = config.ChatEval(source="sft", task_name="TwoStep|Choice", max_problems=5, max_new_tokens=4, device_type="cpu")
    chat_eval.main(cfg)
    out = capsys.readouterr().out
    assert "answers: greedy, at most 4 tokens\n" in out and "(n=5), the first of 1,000 problems, " in out
    missing = "ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval, SpellingBee"
    assert f"no ChatCORE: not evaluated on the test problems of {missing}\n" in out
    records = {r["task"]: r for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r["kind"] == "eval"}
    cut, stopped = records["TwoStep"]["cut"], round(records["TwoStep"]["truncated"] * 5)
    assert cut == 2 and f"{cut} of 5 prompts cut to the context" in out
    assert f"{stopped} of 5 answers stopped at the limit" in out
    chat_eval.main(dataclasses.replace(cfg, temperature=0.8, num_samples=3))
    out = capsys.readouterr().out
    settings = "temperature 0.8, top-k 50, seed 42, at most 4 tokens, 3 per problem, solved if any is right (pass@3)"
    assert f"answers: {settings}\n" in out
    chosen = [r for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r.get("task") == "Choice"]
    assert [(r["temperature"], r["num_samples"]) for r in chosen] == [(0.0, 1)]  # a choice is not sampled
    chat_eval.main(dataclasses.replace(cfg, num_samples=3))
    assert "(pass@3); they are all equal, because -t is 0\n" in capsys.readouterr().out


def test_a_sampled_chatcore_does_not_replace_the_greedy_one(own_base_dir, model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "CHATCORE_TASKS", ("Sums",))
    save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    cfg = config.ChatEval(source="sft", task_name="Sums", max_problems=3, max_new_tokens=2, device_type="cpu")
    chat_eval.main(cfg)
    chat_eval.main(dataclasses.replace(cfg, temperature=1.0, num_samples=2))
    records = run_log.read(own_base_dir / "sft_checkpoints" / "tiny")
    kept = sorted((r["task"], r["temperature"], r["num_samples"]) for r in records if r["kind"] == "eval")
    assert kept == [("ChatCORE", 0.0, 1), ("ChatCORE", 1.0, 2), ("Sums", 0.0, 1), ("Sums", 1.0, 2)]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "-i is missing"),
        (["-i", "best"], "--source=best: must be base, mid, sft or rl"),
        (["-i", "sft", "-a", "MMLU|poker"], "unknown task 'poker'"),
        (["-i", "sft", "-a", "SmolTalk"], "for training only"),
        (["-i", "sft", "-a", "Sums"], "no sft checkpoint"),
    ],
)
def test_what_the_script_cannot_do_is_one_line(flags, complaint):
    command = [sys.executable, "-m", "scripts.chat_eval", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert complaint in done.stderr and len(done.stderr.strip().splitlines()) == 1


# -----------------------------------------------------------------------------
# Several devices: in a separate process, since JAX counts its devices once

ON_DEVICES = """
import json, random, sys
sys.path += ["tests/support", "tests/evals"]
import jax
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.evals import bpb, chat
from nanochat_jax.evals.model import EvalModel
from test_chat_eval import Begin, Quiz, WORDS
from nanochat_jax.config import GPTConfig
from nanochat_jax.tokenizer import Tokenizer
import numpy as np
tokenizer = Tokenizer.train([" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(50)], 320)
model_cfg = GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, vocab_size=tokenizer.vocab_size, sequence_len=128)
one = jax.device_put(gpt.init(model_cfg, seed=3) | {}, jax.devices()[0])
one = jax.tree.map(lambda x: x + 0.2, one) | {"lm_head": one["lm_head"] * 1000}
many = jax.device_put(one, sharding.replicated(sharding.make_mesh()))
compiled = []
def record(event, *_, **__):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(event)
jax.monitoring.register_event_duration_secs_listener(record)
for params in (one, many):
    model = EvalModel(params, model_cfg, tokenizer)
    quiz = chat.evaluate(model, Quiz(), batch_size=6)
    compiled.clear()
    begin = chat.evaluate(model, Begin(), chat.Sampling(max_new_tokens=3))
    programs = len(compiled)
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 300, (8, 16), dtype=np.int32) for k in ("inputs", "targets")}
    bits = bpb.bits_per_byte(model, [batch])
    bits = [round(bits.bpb, 4), round(bits.stderr, 4), bits.tokens, bits.rows]
    print(json.dumps([programs, jax.device_count(), quiz.answers, begin.answers, bits]))
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    env = os.environ | {"XLA_FLAGS": tiny.xla_flags(4), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (programs, *one), (programs_for_four, *many) = map(json.loads, done.stdout.strip().splitlines()[-2:])
    # A few small programs move data between devices. The large ones are not compiled for each device.
    assert programs_for_four < 2 * programs, f"{programs_for_four} programs, for one device {programs}"
    assert one == many and one[0] == 4


IN_PROCESSES = """
import json, random, sys
sys.path += ["tests/support", "tests/evals"]
import jax
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.evals import batching, bpb, chat, core
import numpy as np
from nanochat_jax.evals.model import EvalModel
from test_chat_eval import Begin, Quiz, WORDS
from nanochat_jax.config import GPTConfig
from nanochat_jax.tokenizer import Tokenizer
where, count, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
devices.start("cpu", where, count, process)
tokenizer = Tokenizer.train([" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(50)], 320)
model_cfg = GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, vocab_size=tokenizer.vocab_size, sequence_len=128)
layout = sharding.Layout(sharding.make_mesh(), "full")
def init():
    params = jax.tree.map(lambda x: x + 0.2, gpt.init(model_cfg, seed=3))
    return params | {"lm_head": (params["lm_head"] - 0.2) * 1000}
params = jax.jit(init, out_shardings=layout.shardings(layout.param_specs(jax.eval_shape(init))))()
asked = []
class Recorded(Begin):
    def __getitem__(self, i):
        asked.append(i)
        return super().__getitem__(i)
model, sampling = EvalModel(params, model_cfg, tokenizer), chat.Sampling(max_new_tokens=3)
begin = chat.evaluate(model, Recorded(), sampling)
one = chat.evaluate(model, Begin(), sampling, max_problems=1)
quiz = chat.evaluate(model, Quiz(), batch_size=6)
rng = np.random.default_rng(0)
batch = {k: rng.integers(0, 300, (8, 16), dtype=np.int32) for k in ("inputs", "targets")}
mine = slice(8 // count * process, 8 // count * (process + 1))
bits = bpb.bits_per_byte(model, [{k: rows[mine] for k, rows in batch.items()}] * 2)
bits = [round(bits.bpb, 4), round(bits.stderr, 4), bits.tokens, bits.rows]
core.LOGITS_AT_ONCE = 4 * 5 * model_cfg.vocab_size  # the head is applied to slices of a few positions
bounds = np.array([[3, 9 + i] for i in range(8)], np.int32)
arrays = [batching.put(params, array) for array in (batch["inputs"], bounds)]
mesh = sharding.mesh_of(params)
losses = batching.fetch(core._score(params, model_cfg, *arrays, np.dtype("float32"), mesh)[0])
losses = [round(float(loss), 4) for loss in losses]
asked = batching.gather([len(set(asked))])
print(json.dumps([asked, begin.answers, begin.truncated, one.answers, quiz.answers, bits, losses]))
"""


def in_processes(base: Path, count: int, devices: int) -> list:
    """The output of process 0 of `count`, each with `devices` devices; the weights are sharded over all of them."""
    where = tiny.free_address() if count > 1 else ""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", IN_PROCESSES, where, str(count), str(i)],
            cwd=REPOSITORY,
            text=True,
            env=tiny.environment(base, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "".join(stderr[-2000:] for _, stderr in outputs)
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def test_processes_share_the_problems_and_know_all_answers(tmp_path):
    alone, *expected = in_processes(tmp_path, 1, 1)
    shared, *found = in_processes(tmp_path, 2, 2)
    assert alone == [12] and shared == [6, 6]
    assert found == expected
