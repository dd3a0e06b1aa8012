"""CORE: prompts equal to the specification's, scores equal to those of a plain loop, batched in any way."""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import random
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from serving import save_model

from nanochat_jax import config, run_log
from nanochat_jax.config import GPTConfig, UserError, base_dir
from nanochat_jax.evals import bundle as bundles
from nanochat_jax.evals import core
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer
from scripts import base_eval

TEXT = "the cat sat on a mat and saw one dog run to the big red house by the sea in the sun"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(50)], 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model with random weights everywhere, so that its first choices differ."""
    model_cfg = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, vocab_size=tokenizer.vocab_size, sequence_len=64)
    params = tiny.random_params(model_cfg, 0.3)
    return EvalModel(params, model_cfg, tokenizer)


def sentence(rng, k=4):
    return " ".join(rng.choices(WORDS, k=k))


def make_items(kind, n=23):
    rng = random.Random(7)
    if kind == "multiple_choice":
        return [
            {"query": sentence(rng, i % 6 + 1), "choices": [sentence(rng, j + 1) for j in range(i % 3 + 2)], "gold": 1}
            for i in range(n)
        ]
    if kind == "schema":
        return [{"context_options": [sentence(rng), sentence(rng, 2)], "continuation": sentence(rng), "gold": 0}] * n
    return [{"context": sentence(rng) + " ", "continuation": rng.choice(WORDS)} for i in range(n)]


def make_bundle(folder, tasks):
    """A bundle in `folder`; tasks: {label: (kind, shots, items)}."""
    (folder / "eval_data" / "some").mkdir(parents=True)
    yaml, meta = "icl_tasks:\n", "Eval Task,Random baseline,Description\n"
    for i, (label, (kind, shots, items)) in enumerate(tasks.items()):
        lines = "".join(json.dumps(item) + "\n" for item in items).encode()
        path = folder / "eval_data" / "some" / f"{label}.jsonl"
        if i % 2:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(lines))
        else:
            path.write_bytes(lines)
        yaml += f"-\n  label: {label}\n  dataset_uri: some/{label}.jsonl\n  num_fewshot: [{shots}]\n"
        yaml += f"  icl_task_type: {kind}\n" + '  continuation_delimiter: "\\nA: "\n' * (kind == "language_modeling")
        meta += f'{label},{25 if kind == "multiple_choice" else 0},"one, two"\n'
    (folder / "core.yaml").write_text(yaml, encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(meta, encoding="utf-8")
    return folder


@functools.partial(jax.jit, static_argnames="model_cfg")
def _logprobs(params, model_cfg, ids):
    return jax.nn.log_softmax(gpt.forward(params, model_cfg, ids))


def logprobs(model, row):
    """Log probabilities of every token after every prefix of one row, [t,v]; padded on the right to compile once."""
    ids = np.zeros((1, model.model_cfg.sequence_len), np.int32)
    ids[0, : len(row)] = row
    return np.asarray(_logprobs(model.params, model.model_cfg, ids))[0]


def plain_accuracy(model, tokenizer, task, max_per_task=-1):
    """The specification, one prompt at a time."""
    items = task.items()
    random.Random(1337).shuffle(items)
    items = items[:max_per_task] if max_per_task > 0 else items
    right = 0
    for index, item in enumerate(items):
        texts = core.prompts(task, items, index)
        rows = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
        logp = [logprobs(model, row) for row in rows]

        def losses(o, start, stop, rows=rows, logp=logp):
            return [-logp[o][i - 1, rows[o][i]] for i in range(start, stop)]

        if task.kind == "language_modeling":
            (without, row), scores = rows, logp[1]
            assert row[: len(without)] == without
            right += all(scores[i - 1].argmax() == row[i] for i in range(len(without), len(row)))
            continue
        shortest = min(map(len, rows))
        same = 0
        if task.kind == "multiple_choice":
            while same < shortest - 1 and len({row[same] for row in rows}) == 1:
                same += 1
            means = [np.mean(losses(o, same, len(row))) for o, row in enumerate(rows)]
        else:
            while same < shortest - 1 and len({row[-1 - same] for row in rows}) == 1:
                same += 1
            means = [np.mean(losses(o, len(row) - same, len(row))) for o, row in enumerate(rows)]
        right += int(np.argmin(means)) == item["gold"]
    return right / len(items)


@pytest.mark.golden
def test_prompts_equal_the_specifications(golden_dir, data_dir):
    golden = json.loads((golden_dir / "core_prompts.json").read_text(encoding="utf-8"))["items"]
    folder = core.find_bundle(data_dir / "core")
    tasks = {task.label: task for task in core.read_tasks(folder)}
    assert list(tasks) == list(dict.fromkeys(entry["task"] for entry in golden)) and len(tasks) == 22
    for label, task in tasks.items():
        items = task.items()
        random.Random(1337).shuffle(items)
        for entry in (e for e in golden if e["task"] == label):
            assert task.kind == entry["type"] and task.num_fewshot == entry["num_fewshot"]
            assert core.prompts(task, items, entry["index"]) == entry["prompts"]
            assert items[entry["index"]].get("gold") == entry["gold"]


def test_baselines_are_fractions(data_dir):
    tasks = {task.label: task.baseline for task in core.read_tasks(data_dir / "core")}
    assert tasks["boolq"] == pytest.approx(0.62) and tasks["jeopardy"] == 0 and tasks["copa"] == 0.5


@pytest.mark.parametrize("kind", bundles.KINDS)
def test_scores_equal_a_plain_loop_however_batched(tmp_path, model, tokenizer, kind):
    folder = make_bundle(tmp_path, {"one": (kind, 1, make_items(kind))})
    [task] = core.read_tasks(folder)
    expected = plain_accuracy(model, tokenizer, task)
    for batch_size in (5, 64):
        score = core.evaluate_task(model, task, batch_size=batch_size)
        assert score.score == pytest.approx(expected) and score.n == 23 and score.cut == 0
    assert score.stderr == pytest.approx((expected * (1 - expected) / 23) ** 0.5)


def test_language_modeling_can_be_right(tmp_path, model, tokenizer):
    """Uses continuations that the model itself would write: if all were wrong, any two implementations would agree."""
    items = []
    for word in WORDS[:8]:
        ids = [tokenizer.bos, *tokenizer.encode(f"{word}\nA:")]
        text = tokenizer.decode([int(logprobs(model, ids)[len(ids) - 1].argmax())])
        items.append({"context": word, "continuation": text})
    task = bundles.CoreTask("own", "language_modeling", tmp_path / "own.jsonl", 0, "\nA:", 0.0)
    task.path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    kept = [i for i in items if tokenizer.encode("\nA:" + i["continuation"])[:-1] == tokenizer.encode("\nA:")]
    score = core.evaluate_task(model, task)
    assert score.score * 8 >= len(kept) > 0


def test_core_is_the_mean_of_the_centered_scores(tmp_path, model, tokenizer):
    tasks = {kind: (kind, 1, make_items(kind)) for kind in bundles.KINDS}
    seen = []
    result = core.evaluate(model, make_bundle(tmp_path, tasks), max_per_task=5, report=seen.append)
    assert result.tasks == seen and [t.task for t in seen] == list(tasks) and {t.n for t in seen} == {5}
    [choice, *others] = result.tasks
    assert choice.centered == pytest.approx((choice.score - 0.25) / 0.75)
    assert result.core == pytest.approx((choice.centered + sum(t.score for t in others)) / 3)
    assert result.n == 15


def test_fewer_items_than_shots(tmp_path, model, tokenizer):
    folder = make_bundle(tmp_path, {"one": ("multiple_choice", 10, make_items("multiple_choice", 3))})
    [task] = core.read_tasks(folder)
    items = task.items()
    assert core.prompts(task, items, 0)[0].count("\n\n") == 2
    for n in (1, 2, 3):
        assert core.evaluate_task(model, task, max_per_task=n).n == n


def test_an_example_is_never_the_item_itself(tmp_path):
    task = bundles.CoreTask("t", "multiple_choice", tmp_path, 4, " ", 0.0)
    items = [{"query": f"q{i}", "choices": ["x"], "gold": 0} for i in range(6)]
    for i in range(6):
        *examples, own = core.prompts(task, items, i)[0].split("\n\n")
        assert own == f"q{i} x" and len(set(examples)) == 4 and own not in examples


def test_an_option_that_begins_another_still_has_a_score(tmp_path, model, tokenizer):
    """nanochat scores an empty span there, which is NaN; here the comparison begins one token earlier instead."""
    encode = tokenizer.encode
    options = [encode("the cat", prepend=0), encode("the cat sat on", prepend=0)]
    spans = core._item_spans(options, "multiple_choice", 64)
    assert [s.start for s in spans] == [len(options[0]) - 1] * 2
    same = core._item_spans([options[0], options[0]], "schema", 64)
    assert [s.start for s in same] == [1, 1]
    apart = core._item_spans([encode("the cat", prepend=0), encode("the sun", prepend=0)], "schema", 64)
    assert all(0 < s.start < len(s.ids) for s in apart)
    items = [{"query": "the", "choices": ["cat", "cat sat", "cat sat"], "gold": 0}] * 2
    folder = make_bundle(tmp_path, {"one": ("multiple_choice", 0, items)})
    assert core.evaluate_task(model, core.read_tasks(folder)[0]).score in (0, 1)


def test_a_continuation_the_tokenizer_merges_into_the_prompt(tokenizer):
    """The prompt's tokens need not be a prefix of all tokens. The part that differs is scored, at least one token."""
    [span] = core._item_spans([[0, 5, 6, 7], [0, 5, 8, 9]], "language_modeling", 64)
    assert span.start == 2
    [span] = core._item_spans([[0, 5, 6], [0, 5, 6]], "language_modeling", 64)
    assert span.start == 2


def test_long_prompts_lose_their_beginning_but_not_bos(model, tokenizer, tmp_path):
    span = core._fit(np.arange(100, 200), 95, 64)
    assert span.cut and len(span.ids) == 64 and span.ids[0] == 100 and span.ids[-1] == 199
    assert span.ids[span.start] == 195
    assert core._fit(np.arange(100), 10, 64).start == 1  # even the scored part is too long
    items = [{"query": sentence(random.Random(i), 200), "choices": ["cat", "dog sat"], "gold": 0} for i in range(3)]
    [task] = core.read_tasks(make_bundle(tmp_path, {"one": ("multiple_choice", 0, items)}))
    score = core.evaluate_task(model, task)
    assert score.cut == score.prompts == 6 and score.n == 3


def evaluated(own_base_dir, model, tokenizer, bundle, capsys, **changes):
    """What base_eval prints, logs and writes: (lines, records by task, CSV tables by file name)."""
    if not (own_base_dir / "sft_checkpoints").exists():
        save_model(own_base_dir, model.params, model.model_cfg, tokenizer)
    base_eval.main(config.BaseEval(source="sft", core_dir=str(bundle), device_type="cpu", **changes))
    records = run_log.read(own_base_dir / "sft_checkpoints" / "tiny")
    files = {}
    for path in (own_base_dir / "base_eval").glob("*.csv"):
        rows = [[cell.strip() for cell in line.split(",")] for line in path.read_text().splitlines()]
        files[path.name] = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    return capsys.readouterr().out.splitlines(), {r["task"]: r for r in records if r["kind"] == "eval"}, files


def test_base_eval_says_what_was_cut_and_how_sure_each_number_is(own_base_dir, tmp_path, model, tokenizer, capsys):
    long = [{"query": sentence(random.Random(i), 200), "choices": ["cat", "dog sat"], "gold": i % 2} for i in range(8)]
    tasks = {"long": ("multiple_choice", 0, long), "short": ("multiple_choice", 1, make_items("multiple_choice"))}
    lines, records, files = evaluated(own_base_dir, model, tokenizer, make_bundle(tmp_path, tasks), capsys)
    p = records["long"]["score"]
    stderr = (p * (1 - p) / 8) ** 0.5
    centered = f"centered {(p - 0.25) / 0.75:+.4f} ± {stderr / 0.75:.4f}"
    [line] = [line for line in lines if line.startswith("long ")]
    assert f" {p:.4f} ± {stderr:.4f} (n=8), {centered}, 16 of 16 prompts cut to the context, " in line
    assert "cut" not in next(line for line in lines if line.startswith("short "))
    ending = f"(n=31), 2 tasks, 16 of {16 + records['short']['prompts']} prompts cut to the context"
    assert any(line.startswith("CORE ") and line.endswith(ending) for line in lines)
    assert [records[task]["cut"] for task in ("long", "short", "CORE")] == [16, 0, 16]
    [table] = files.values()
    assert table["long"].items() >= {"N": "8", "Cut": "16", "Stderr": f"{stderr:.6f}"}.items()
    assert table["CORE"].items() >= {"N": "31", "Cut": "16", "Stderr": f"{records['CORE']['stderr']:.6f}"}.items()


def test_a_part_of_core_replaces_nothing_of_the_whole(own_base_dir, tmp_path, model, tokenizer, capsys):
    bundle = make_bundle(tmp_path, {"one": ("multiple_choice", 10, make_items("multiple_choice"))})
    lines, _, whole = evaluated(own_base_dir, model, tokenizer, bundle, capsys)
    assert "few-shot" not in "\n".join(lines)
    lines, records, files = evaluated(own_base_dir, model, tokenizer, bundle, capsys, max_per_task=3)
    assert files.keys() == {"sft_tiny_000007.csv", "sft_tiny_000007_max3.csv"} and files.items() > whole.items()
    assert any("only 2 of 10 few-shot examples" in line for line in lines) and records["one"]["shots"] == 2
    logged = [r["n"] for r in run_log.read(own_base_dir / "sft_checkpoints" / "tiny") if r.get("task") == "CORE"]
    assert logged == [23, 3]


@pytest.mark.parametrize("kind", bundles.KINDS)
def test_a_model_that_computes_nothing_has_no_score(tmp_path, model, tokenizer, kind):
    """NaN would be the lowest loss for argmin: the first option, so about the score of guessing."""
    broken = dataclasses.replace(model, params=model.params | {"wte": model.params["wte"] * np.nan})
    [task] = core.read_tasks(make_bundle(tmp_path, {"one": (kind, 0, make_items(kind))}))
    with pytest.raises(UserError, match=r"one: the model's losses are not finite: .*--step"):
        core.evaluate_task(broken, task)


def test_slices_of_the_head_change_nothing(model, monkeypatch):
    params, model_cfg = model.params, model.model_cfg
    ids = jax.random.randint(jax.random.key(0), (3, 40), 0, model_cfg.vocab_size)
    whole = jax.jit(lambda: core.token_scores(params, model_cfg, ids, jnp.roll(ids, -1, 1), jnp.float32, None))()
    monkeypatch.setattr(core, "LOGITS_AT_ONCE", 3 * model_cfg.vocab_size * 7)
    slices = jax.jit(lambda: core.token_scores(params, model_cfg, ids, jnp.roll(ids, -1, 1), jnp.float32, None))()
    np.testing.assert_allclose(slices[0], whole[0], rtol=1e-5)
    np.testing.assert_array_equal(slices[1], whole[1])


# -----------------------------------------------------------------------------
# The bundle


def archive(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"eval_bundle/{path.relative_to(folder)}")
    return buffer.getvalue()


def test_download_is_atomic_and_pinned(tmp_path, monkeypatch):
    """From a file: URL, through the same client as from the network."""
    monkeypatch.setattr(bundles, "time", type("Clock", (), {"sleep": staticmethod(lambda s: None)}))
    source = tmp_path / "bundle.zip"
    monkeypatch.setattr(bundles, "URL", source.as_uri())
    with pytest.raises(UserError, match=r"unzip it to .*--core_dir"):
        core.find_bundle()
    data = archive(make_bundle(tmp_path / "made", {"one": ("schema", 0, make_items("schema"))}))
    source.write_bytes(data[:-50])  # truncated
    with pytest.raises(UserError, match="cannot be unpacked"):
        core.find_bundle()
    assert list(base_dir().iterdir()) == []
    source.write_bytes(data)
    folder = core.find_bundle()
    assert folder == base_dir() / "eval_bundle" and [t.label for t in core.read_tasks(folder)] == ["one"]
    assert (base_dir() / "eval_bundle.sha256").read_text().strip() == hashlib.sha256(data).hexdigest()
    source.unlink()
    assert core.find_bundle() == folder  # not downloaded again
    assert sorted(p.name for p in base_dir().iterdir()) == ["eval_bundle", "eval_bundle.sha256"]
    folder.rename(tmp_path / "elsewhere")
    source.write_bytes(data + b"x")
    with pytest.raises(UserError, match="has changed"):
        core.find_bundle()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no core\.yaml"):
        core.find_bundle(tmp_path / "nowhere")
    folder = make_bundle(tmp_path / "b", {"one": ("schema", 0, make_items("schema"))})
    (folder / "eval_data" / "some" / "one.jsonl").unlink()
    with pytest.raises(UserError, match=r"no eval_data/some/one.jsonl\[.gz\]"):
        core.find_bundle(folder)
    (folder / "eval_data" / "some" / "one.jsonl").write_text('{"context_options": ["a"]}\n')
    with pytest.raises(UserError, match="line 1"):
        core.read_tasks(folder)[0].items()
    (folder / "eval_meta_data.csv").unlink()
    with pytest.raises(UserError, match=r"eval_meta_data\.csv is missing"):
        core.find_bundle(folder)


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("multiple_choice", {"gold": -1}, "gold is -1, which hides the right answer, expected 0 to 2"),
        ("multiple_choice", {"gold": 3}, "gold is 3, expected 0 to 2"),
        ("multiple_choice", {"gold": True}, "gold is True, expected 0 to 2"),
        ("multiple_choice", {"gold": "1"}, "gold is '1', expected 0 to 2"),
        ("multiple_choice", {"gold": None}, "gold is None, expected 0 to 2"),
        ("multiple_choice", {"query": None}, "query is None, expected text"),
        ("multiple_choice", {"choices": ["a", 7]}, r"choices\[1\] is 7, expected text"),
        ("multiple_choice", {"choices": "ab"}, "choices is 'ab', expected a list of texts"),
        ("schema", {"gold": -1}, "gold is -1, which hides the right answer"),
        ("schema", {"gold": -2}, "gold is -2, expected 0 to 1"),
        ("schema", {"continuation": None}, "continuation is None, expected text"),
        ("language_modeling", {"context": 5}, "context is 5, expected text"),
        ("language_modeling", {"continuation": " "}, "continuation is empty"),
    ],
)
def test_an_item_that_cannot_be_scored_is_refused_with_its_line(tmp_path, kind, change, complaint):
    good, bad = make_items(kind, 2)
    folder = make_bundle(tmp_path / "b", {"one": (kind, 0, [good, bad | change])})
    with pytest.raises(UserError, match=rf"one\.jsonl, line 2: not an item of kind {kind} \({complaint}") as caught:
        core.read_tasks(folder)[0].items()
    assert "\n" not in str(caught.value)


def test_the_real_items_pass(data_dir):
    assert all(task.items() for task in core.read_tasks(data_dir / "core"))
