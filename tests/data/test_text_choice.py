"""Which text is read when no flag names one, in the commands as users type them; and how often it is read."""

import json
import random
import re
import shutil
import subprocess
import sys

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hub_server import serving

from nanochat_jax import commandline, config, run_log
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, sources
from nanochat_jax.tokenizer import Tokenizer
from scripts import tok_train

WORDS = "the a small large red cat dog tree house sees likes finds near under with and then 12 7 305".split()
SHARD = 40_000  # characters in a shard, about
TINY = ["--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=64", "--total_batch_size=256",
        "--device_batch_size=2", "--eval_every=-1", "--eval_tokens=256", "--core_metric_every=-1", "--sample_every=-1",
        "--compute_dtype=float32"]  # fmt: skip


def documents(seed, chars=SHARD):
    rng, made = random.Random(seed), []
    while sum(map(len, made)) < chars:
        made.append(f"shard {seed}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 120))))
    return made


def copy_here(source, shards, requested=None):
    """Puts shards of a source where a download would put them."""
    folder = hub.folder_of(source)
    folder.mkdir(parents=True, exist_ok=True)
    for i in (*range(shards), hub.SOURCES[source][1]):
        pq.write_table(pa.table({"text": documents(i)}), folder / hub.shard_name(i), row_group_size=16)
    if requested:
        (folder / "manifest.json").write_text(json.dumps({"source": source, "shards": requested}))


def run(base, module, *flags, **env):
    command = [sys.executable, "-m", module, *flags]
    if not env:
        return forked.run(command, tiny.environment(base))
    return subprocess.run(  # the Hub's library reads its environment variables at import
        command, cwd=config.REPOSITORY, env=tiny.environment(base) | env, capture_output=True, text=True, timeout=300
    )


def one_line(done):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    return done.stderr


def record():
    return json.loads((config.base_dir() / "tokenizer" / "source.json").read_text(encoding="utf-8"))


def make_tokenizer(**recorded):
    folder = config.base_dir() / "tokenizer"
    Tokenizer.train(documents(0), 300).save(folder)
    if recorded:
        (folder / "source.json").write_text(json.dumps(recorded))


# -----------------------------------------------------------------------------
# The commands, one after the other


def test_download_then_tokenizer_then_base_without_a_flag(own_base_dir, tmp_path):
    """Every stage reads the text that was downloaded, says so, and base refuses to read it too often."""
    store = tmp_path / "hub"
    store.mkdir()
    for i in (0, 1, 1822):
        pq.write_table(pa.table({"text": documents(i)}), store / hub.shard_name(i), row_group_size=16)
    with serving(store) as server:
        done = run(own_base_dir, "nanochat_jax.dataset", "-n", "2", HF_ENDPOINT=server.url)
    assert done.returncode == 0, done.stderr

    done = run(own_base_dir, "scripts.tok_train", "--vocab_size=300")
    assert done.returncode == 0, done.stderr
    line = "text: fineweb-edu, 2 training shards requested, 2 of them here"
    assert f"{line} (the text that was downloaded; --data=local reads the local corpus)\n" in done.stdout
    assert record()["source"] == "fineweb-edu" and not (own_base_dir / "data" / "local").exists()
    assert "fineweb-edu has only 80" in done.stdout and "-n 1822\n" in done.stdout  # 10 billion characters were wanted

    done = run(own_base_dir, "scripts.doctor", *TINY, "--num_iterations=20000", HF_HUB_OFFLINE="1")
    assert re.search(r"^Text: +fineweb-edu, 2 training shards requested, 2 of them here \(the tok", done.stdout, re.M)
    assert re.search(r"^Passes: +training will refuse this: [\d.]+ passes over", done.stdout, re.M), done.stdout

    # 20,000 steps of 256 tokens are more than 8 times the text; so are the steps that the depth asks for.
    train = ["scripts.train", "--stage=base", *TINY]
    error = one_line(run(own_base_dir, *train, "--num_iterations=20000"))
    asked = re.search(
        r"error: ([\d.]+) passes over the [\d.]+K tokens of fineweb-edu are more than --max_epochs=8: download "
        r"more \(python -m nanochat_jax.dataset --data=fineweb-edu -n (\d+)\), train fewer steps "
        r"\(--num_iterations=(\d+)\), or allow it \(--max_epochs=(\d+)\)",
        error,
    )
    assert asked, error
    passes, shards, steps, allowed = (float(number) for number in asked.groups())
    assert 20000 * 8 / passes == pytest.approx(steps, abs=20) and passes * 2 <= shards < passes * 2 + 1
    assert passes <= allowed < passes + 1
    assert not (own_base_dir / "base_checkpoints" / "d2" / "log.jsonl").exists(), "refused before anything is written"
    done = run(own_base_dir, *train, "--num_iterations=4")
    assert done.returncode == 0 and f"{line} (the tokenizer was trained on it)\n" in done.stdout, done.stderr

    # All that comes later reads the same text, and says so.
    for module, flags in (("scripts.tok_eval", []), ("scripts.base_loss", ["--split_tokens=256"])):
        done = run(own_base_dir, module, *flags)
        assert done.returncode == 0 and line in done.stdout, done.stdout + done.stderr


def test_more_passes_are_read_if_asked_for(own_base_dir):
    copy_here("fineweb-edu", 1)
    make_tokenizer(source="fineweb-edu")
    flags = ["--stage=base", *TINY, "--num_iterations=4"]
    assert "--max_epochs=0.01: " in one_line(run(own_base_dir, "scripts.train", *flags, "--max_epochs=0.01"))
    done = run(own_base_dir, "scripts.train", *flags, "--max_epochs=0.5", "--save_every=2")
    assert done.returncode == 0, done.stderr
    done = run(own_base_dir, "scripts.train", *flags, "--resume=2", "--max_epochs=8")
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, "it may change when a run resumes"


def test_shards_that_were_requested_but_are_not_here_count(own_base_dir):
    from nanochat_jax.training.passes import Amount

    copy_here("fineweb-edu", 1, requested=100)
    make_tokenizer(source="fineweb-edu")
    source, tokenizer = sources.open(), Tokenizer.load(own_base_dir / "tokenizer")
    amount = Amount.of(source, tokenizer, own_base_dir / "none")
    one = Amount.of(sources.open(num_files=1), tokenizer, own_base_dir / "none")
    assert amount.tokens == pytest.approx(100 * one.tokens)
    steps = int(one.tokens * 50) // 256  # half a pass over 100 shards, 50 passes over the one that is here
    amount.check(8, steps, 256)
    with pytest.raises(UserError, match=r"^5[01]\.\d passes over"):
        one.check(8, steps, 256)


# -----------------------------------------------------------------------------
# What tok_train reads


def test_several_downloads_are_listed_and_one_has_to_be_chosen(own_base_dir):
    copy_here("fineweb-edu", 1)
    assert sources.downloaded().source == "fineweb-edu", "shards that were copied by hand count"
    make_tokenizer(source="fineweb-edu")
    copy_here("climbmix", 1)
    error = one_line(run(own_base_dir, "scripts.tok_train"))
    listed = "2 texts were downloaded (fineweb-edu, climbmix)"
    assert error == f"error: {listed}: choose one with --data=fineweb-edu or --data=climbmix\n"
    assert sources.recorded().source == "fineweb-edu", "later stages keep to the tokenizer's"


def test_a_new_download_replaces_the_text_of_the_current_tokenizer(own_base_dir, capsys):
    make_tokenizer(source="local")
    copy_here("climbmix", 1)
    tok_train.main(config.TokTrain(vocab_size=300))
    assert "; the current tokenizer was trained on local)" in capsys.readouterr().out
    assert record()["source"] == "climbmix"


def test_a_download_that_has_only_begun_counts(own_base_dir):
    folder = hub.folder_of("fineweb-edu")
    folder.mkdir(parents=True)
    assert sources.downloaded().source == "local", "nothing has arrived"
    (folder / "shard_01822.parquet.0123.part").write_bytes(b"half")
    error = one_line(run(own_base_dir, "scripts.tok_train"))
    assert "fineweb-edu: no validation shard" in error and "python -m nanochat_jax.dataset" in error


def test_converted_folders_count_if_nothing_was_downloaded(own_base_dir, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(0)))
    done = run(own_base_dir, "nanochat_jax.dataset", f"--data_dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    done = run(own_base_dir, "scripts.tok_train", "--vocab_size=300")
    assert f"text: one, {tmp_path / 'one'} (the text used before; --data=local reads the local corpus)" in done.stdout
    assert record()["data_dir"] == str(tmp_path / "one")

    sources.open(data_dir=tmp_path / "two")
    with pytest.raises(UserError, match=rf"choose one with --data_dir={tmp_path}/one or --data_dir={tmp_path}/two$"):
        sources.downloaded()
    shutil.rmtree(tmp_path / "two")
    assert sources.downloaded().data_dir == str(tmp_path / "one"), "a folder that is gone is no choice"
    capsys.readouterr()
    sources.open("local", tmp_path / "one", build=True)
    assert "(--data_dir, which replaces --data=local)" in capsys.readouterr().out


def test_another_text_than_the_tokenizers_is_said(own_base_dir, capsys):
    copy_here("fineweb-edu", 1)
    make_tokenizer(source="climbmix")
    sources.open("fineweb-edu")
    assert "here (--data; the current tokenizer was trained on climbmix)\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"hash": "0"}'])
def test_a_tokenizer_that_does_not_name_its_text_is_no_reason_for_the_local_corpus(content, own_base_dir):
    make_tokenizer()
    if content is not None:
        (own_base_dir / "tokenizer" / "source.json").write_text(content)
    with pytest.raises(UserError, match=r"does not say which text .* --data=local or --data_dir=FOLDER") as caught:
        sources.open()
    assert "\n" not in str(caught.value)
    if content is None:
        error = one_line(run(own_base_dir, "scripts.train", "--stage=base", *TINY, "--num_iterations=1"))
        assert "does not say which text" in error
        copy_here("climbmix", 1)
        with pytest.raises(UserError, match="--data=climbmix"):
            sources.open()


# -----------------------------------------------------------------------------
# How much of it tok_train reads


def test_as_many_shards_are_read_as_the_characters_need(own_base_dir, capsys):
    copy_here("fineweb-edu", 12, requested=12)
    cfg = {"data": "fineweb-edu", "vocab_size": 300, "doc_cap": 10_000}
    tok_train.main(config.TokTrain(max_chars=10 * SHARD, **cfg))  # the old default was 8 shards
    [log] = run_log.read(own_base_dir / "tokenizer")
    assert 10 * SHARD < log["chars"] < 10.1 * SHARD and record()["num_files"] == 10
    assert "has only" not in capsys.readouterr().out

    # More shards make no difference to this tokenizer, so it is not trained again; fewer do.
    copy_here("fineweb-edu", 13, requested=13)
    tok_train.main(config.TokTrain(max_chars=10 * SHARD, **cfg))
    tok_train.main(config.TokTrain(max_chars=10 * SHARD, num_files=10, **cfg))
    assert capsys.readouterr().out.count("already trained") == 2

    tok_train.main(config.TokTrain(max_chars=100 * SHARD, **cfg))
    assert record()["num_files"] == 13
    printed = capsys.readouterr().out
    assert re.search(
        r"fineweb-edu has only 52\dK of --max_chars=4.00M characters: all 13 shards were read; download more with "
        r"python -m nanochat_jax.dataset --data=fineweb-edu -n \d+\n", printed
    ), printed  # fmt: skip
    tok_train.main(config.TokTrain(max_chars=100 * SHARD, **cfg))
    assert "already trained" in capsys.readouterr().out
    copy_here("fineweb-edu", 14, requested=14)
    tok_train.main(config.TokTrain(max_chars=100 * SHARD, **cfg))
    assert record()["num_files"] == 14, "there is more to read now"

    tok_train.main(config.TokTrain(max_chars=10 * SHARD, num_files=2, **cfg))
    assert record()["num_files"] == 2
    assert "characters in its first 2 shards: read more with --num_files=auto\n" in capsys.readouterr().out


def test_num_files_is_refused_for_a_text_without_shards(own_base_dir, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(0)))
    flags = [f"--data_dir={folder}", "--vocab_size=300"]
    with pytest.raises(UserError, match=rf"^--num_files=1: {folder} is always read whole: leave it out$"):
        tok_train.main(commandline.parse(config.TokTrain, [*flags, "--num_files=1"]))
    with pytest.raises(UserError, match=r"^--num_files=1: local is always read whole: leave it out$"):
        sources.open("local", num_files=1)
    tok_train.main(commandline.parse(config.TokTrain, [*flags, "--config=d20"]))  # has num_files = 8 for the hub
    assert "\n  num_files=8 is not used, because this text is always read whole\n" in capsys.readouterr().out


def test_a_recorded_folder_that_is_gone_is_said(own_base_dir, tmp_path):
    gone = tmp_path / "gone"
    make_tokenizer(source="gone", data_dir=str(gone))
    words = rf"^the tokenizer was trained on {gone}, which is gone: .* --data_dir=FOLDER, or .* --data=local$"
    with pytest.raises(UserError, match=words):
        sources.open()
    assert sources.downloaded().source == "local"
    assert f"the current tokenizer was trained on {gone}" in sources.downloaded().why
