"""Settings: which value wins, which values are refused, and every mistake in one line that names the flag."""

import dataclasses
import errno
import math
import os
import re
import subprocess
import sys

import pytest

from nanochat_jax import commandline, config
from nanochat_jax.commandline import parse
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.tokenizer import SPECIAL_TOKENS
from scripts.bench import data, decode, serve, tokenizer

PRESETS = sorted(p.stem for p in (REPOSITORY / "configs").glob("*.toml"))
SCRIPTS = ["train", "tok_train", "tok_eval", "base_loss", "base_eval", "chat_eval", "chat_cli", "chat_web"]


@pytest.fixture
def preset(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


def test_a_base_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"below cannot be created \(Not a directory\): set NANOCHAT_BASE_DIR to"):
        config.base_dir()


def test_a_python_without_the_packages_is_told_from_the_right_one():
    command = [sys.executable, "-S", "-m", "scripts.train"]  # -S: without the installed packages
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "has no jax: run 'source .venv/bin/activate' ('bash setup.sh' creates it)" in done.stderr


def test_defaults_preset_command_line_in_this_order(preset):
    file = preset("depth = 6\nmatrix_lr = 0.01\n[base]\nmatrix_lr = 0.03\nseed = 7\n[mid]\nseed = 8\n")
    cfg = parse(config.Base, ["--seed=1", file, "--seed", "9"])  # wherever --config stands; the last flag wins
    assert (cfg.depth, cfg.matrix_lr, cfg.seed, cfg.max_seq_len) == (6, 0.03, 9, 2048)
    assert parse(config.Mid, [file]).seed == 8 and parse(config.Mid, [file]).matrix_lr == 0.01


def test_dashes_underscores_a_lone_double_dash_and_auto():
    cfg = parse(config.Base, ["--", "--max-seq-len=64", "--total_batch_size", "1e3", "--device-batch-size=auto"])
    assert (cfg.max_seq_len, cfg.total_batch_size, cfg.device_batch_size) == (64, 1000, 0)


def test_the_word_auto_is_for_settings_that_say_so_whatever_their_help_is(capsys):
    @dataclasses.dataclass(frozen=True)
    class Settings(config.Settings):
        rows: int = config.setting(0, "rows at once", auto=True)
        cars: int = config.setting(3, "automobiles")

    assert parse(Settings, ["--rows=auto"]).rows == 0
    with pytest.raises(UserError, match="--cars: 'auto' is not an integer"):
        parse(Settings, ["--cars=auto"])
    with pytest.raises(UserError, match="--device_batch_size: 'auto' is not an integer"):
        parse(config.Rl, ["--device_batch_size=auto"])
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    printed = capsys.readouterr().out
    assert "rows at once [auto]" in printed and "automobiles [3]" in printed


def test_mixtures_on_the_command_line():
    assert parse(config.Sft, ["--mixture=gsm8k=0,identity=30"]).mixture == {"gsm8k": 0, "identity": 30}
    own = parse(config.Sft, ["--mixture=customjson:runs/lr=3/mine.jsonl=7"]).mixture
    assert own == {"customjson:runs/lr=3/mine.jsonl": 7}
    for wrong in ("gsm8k", "gsm8k=x", "gsm8k=1=2"):
        problem = f"--mixture: '{wrong}' is not a list of name=rows, each name once, like gsm8k=0,"
        with pytest.raises(UserError, match=problem):
            parse(config.Sft, [f"--mixture={wrong}"])


def test_switches_are_true_alone_or_as_they_say():
    for flags, value in (([], False), (["--fresh"], True), (["--fresh=no"], False), (["--fresh", "TRUE"], True)):
        assert parse(config.TokTrain, flags).fresh is value


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_good_for_every_command(name):
    for cls in commandline.COMMANDS:
        parse(cls, [f"--config={name}", *(["generate"] if cls is config.Report else [])])
    assert parse(config.Sft, ["--seed=1", f"--config=configs/{name}.toml"]).preset == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--depth=x"], "--depth: 'x' is not an integer"), (["--dept=3"], "--dept"), (["--seed"], "--seed"),
     (["--matrix_lr=fast"], "--matrix_lr: 'fast' is not a number"), (["--config=nope"], "--config=nope.*cpu, d12"),
     (["--depth=1.5"], "--depth: '1.5'"), (["--depth=auto"], "--depth: 'auto'"), (["--depth=inf"], "--depth: 'inf'")],
)  # fmt: skip
def test_wrong_flags_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        parse(config.Base, arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [("dept = 3", "dept: unknown setting"), ("[base]\nsource = 'x'", r"\[base\] source: unknown setting"),
     ("depth = 'four'", "depth = 'four' is not an integer"), ("depth = ", "not valid TOML"),
     ("depth = true", "depth = True is not an integer"), ("base = 3", "base: unknown setting"),
     ("matrix_lr = true", "matrix_lr = True is not a number"), ("data = 3", "data = 3 is not a string"),
     ("mid.mixture = 3", "mixture = 3 is not a list of name=rows"),
     ("mixture = {a = 1.5}", "is not a list of name=rows"),
     ("tok.fresh = 'perhaps'", "fresh = 'perhaps' is not true or false")],
)  # fmt: skip
def test_wrong_presets_are_named(preset, text, words):
    with pytest.raises(UserError, match=words):
        for cls in (config.Base, config.Mid, config.TokTrain):
            parse(cls, [preset(text)])


def limits(cls):
    """The fields of `cls` that have a range or choices."""
    for field in dataclasses.fields(cls):
        low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
        if "help" in field.metadata and (low > -math.inf or high < math.inf or choices):
            yield field


# Every limit: the setting, the nearest value that is refused, and the nearest one that is accepted.
RANGES = [
    (config.Doctor, "price_per_hour", -0.01, 0.0),
    (config.Base, "depth", 0, 1), (config.Base, "aspect_ratio", 0, 1), (config.Base, "head_dim", 1, 2),
    (config.Base, "n_kv_head", -1, 1), (config.Base, "max_seq_len", 1, 2),
    (config.Base, "seed", -1, 0), (config.Base, "seed", 2**31, 2**31 - 1),
    (config.Base, "num_iterations", 0, 1), (config.Base, "num_iterations", -2, 1),
    (config.Base, "device_batch_size", -1, 1), (config.Base, "keep_last", 0, 1), (config.Base, "grad_clip", -0.1, 0.0),
    (config.Base, "embedding_lr", -0.1, 0.0), (config.Base, "unembedding_lr", -0.1, 0.0),
    (config.Base, "matrix_lr", -0.1, 0.0), (config.Base, "weight_decay", -0.1, 0.0),
    (config.Base, "total_batch_size", 0, 1), (config.Base, "final_lr_frac", -0.1, 0.0),
    (config.Base, "warmup_ratio", -0.1, 0.0), (config.Base, "warmup_ratio", 1.1, 1.0),
    (config.Base, "warmdown_ratio", -0.1, 0.0), (config.Base, "warmdown_ratio", 1.1, 1.0),
    (config.Base, "num_processes", -1, 1), (config.Base, "process_id", -2, 0), (config.Base, "save_every", 0, 1),
    (config.Base, "keep_every", 0, 1), (config.Base, "target_flops", 0.0, 1.0),
    (config.Base, "target_param_data_ratio", -1.0, 0.0), (config.Base, "eval_every", 0, 1),
    (config.Base, "eval_every", -2, -1), (config.Base, "eval_tokens", 0, 1), (config.Base, "core_metric_every", 0, -1),
    (config.Base, "core_metric_max_per_task", 0, 1), (config.Base, "core_metric_max_per_task", -2, -1),
    (config.Base, "sample_every", 0, -1), (config.Mid, "eval_every", 0, -1), (config.Mid, "eval_tokens", 0, 1),
    (config.Mid, "total_batch_size", 0, 1), (config.Mid, "init_lr_frac", -0.1, 0.0), (config.Mid, "source_step", -2, 0),
    (config.Mid, "depth", -1, 1), (config.Mid, "aspect_ratio", -1, 1), (config.Mid, "head_dim", 1, 2),
    (config.Mid, "n_kv_head", -1, 1), (config.Mid, "max_seq_len", 1, 2),
    (config.Sft, "eval_every", 0, -1), (config.Sft, "eval_metrics_every", 0, -1),
    (config.Sft, "eval_metrics_max_problems", 0, 1), (config.Sft, "eval_metrics_max_problems", -2, -1),
    (config.Sft, "total_batch_size", -1, 1), (config.Sft, "init_lr_frac", -0.1, 0.0),
    (config.Sft, "target_examples_per_step", 0, 1), (config.Sft, "num_epochs", 0, 1),
    (config.Rl, "device_batch_size", 0, 1), (config.Rl, "examples_per_step", 0, 1), (config.Rl, "num_samples", 1, 2),
    (config.Rl, "oversampling", 0, 1), (config.Rl, "max_new_tokens", 0, 1), (config.Rl, "temperature", -0.1, 0.0),
    (config.Sft, "eval_examples", 0, 1),
    (config.Rl, "top_k", -1, 0), (config.Rl, "init_lr_frac", -0.1, 0.0), (config.Rl, "num_epochs", 0, 1),
    (config.Rl, "eval_every", 0, -1),
    (config.Rl, "save_every", 0, -1), (config.Rl, "eval_examples", 0, 1), (config.Rl, "eval_samples", 0, 1),
    (config.Base, "max_epochs", -0.1, 0.0), (config.Mid, "max_epochs", -0.1, 0.0),
    (config.Sft, "max_epochs", -0.1, 0.0), (config.TokTrain, "num_files", -2, -1),
    (config.TokTrain, "max_chars", 0, 1), (config.TokTrain, "doc_cap", 0, 1), (config.TokTrain, "vocab_size", 264, 265),
    (config.BaseLoss, "device_batch_size", 0, 1), (config.BaseLoss, "split_tokens", 0, 1),
    (config.BaseEval, "device_batch_size", 0, 1), (config.BaseEval, "max_per_task", 0, -1),
    (config.BaseLoss, "step", -2, 0), (config.BaseEval, "step", -2, 0), (config.ChatEval, "step", -2, 0),
    (config.ChatCli, "step", -2, 0), (config.ChatWeb, "step", -2, 0),
    (config.ChatEval, "max_problems", 0, 1), (config.ChatEval, "max_problems", -2, -1),
    (config.ChatEval, "seed", -1, 0), (config.ChatEval, "seed", 2**31, 2**31 - 1),
    (config.ChatCli, "seed", -1, 0), (config.ChatCli, "seed", 2**31, 2**31 - 1),
    (config.ChatEval, "temperature", -0.1, 0.0), (config.ChatEval, "max_new_tokens", 0, 1),
    (config.ChatEval, "num_samples", 0, 1), (config.ChatEval, "top_k", -1, 0), (config.ChatEval, "batch_size", 0, 1),
    (config.ChatEval, "slots", -1, 1),
    (config.ChatCli, "temperature", -0.1, 0.0), (config.ChatCli, "temperature", 2.1, 2.0),
    (config.ChatCli, "top_k", -1, 0), (config.ChatCli, "top_k", 65537, 65536), (config.ChatCli, "max_new_tokens", 0, 1),
    (config.ChatCli, "seed", -1, 0), (config.ChatCli, "seed", 2**31, 2**31 - 1),
    (config.ChatWeb, "temperature", -0.1, 0.0), (config.ChatWeb, "temperature", 2.1, 2.0),
    (config.ChatWeb, "top_k", -1, 0), (config.ChatWeb, "top_k", 201, 200),
    (config.ChatWeb, "max_new_tokens", 0, 1), (config.ChatWeb, "max_new_tokens", 4097, 4096),
    (config.ChatWeb, "port", -1, 0), (config.ChatWeb, "port", 65536, 65535),
    (config.ChatWeb, "keep_alive", -0.1, 0.0),
    (config.ChatWeb, "num_gpus", 0, 1), (config.ChatWeb, "num_gpus", 1025, 1024),
    (config.ChatWeb, "slots", 0, 1), (config.ChatWeb, "slots", 1025, 1024),
    (config.ChatWeb, "max_waiting", -1, 0), (config.ChatWeb, "max_waiting", 100_001, 100_000),
    (config.ChatWeb, "timeout", -0.1, 0.0),
    (data.Settings, "total_batch_size", 0, 1), (data.Settings, "max_seq_len", 0, 1), (data.Settings, "steps", 0, 1),
    (data.Settings, "rounds", 0, 1),
    (decode.Settings, "depth", -1, 1), (decode.Settings, "vocab_size", -1, 1), (decode.Settings, "prompt", -1, 1),
    (decode.Settings, "new", 1, 2), (decode.Settings, "chunk", 0, 1), (decode.Settings, "rounds", 0, 1),
    (serve.Settings, "clients", 0, 1), (serve.Settings, "requests", 0, 1), (serve.Settings, "prompt", 0, 1),
    (serve.Settings, "new", 1, 2), (serve.Settings, "rounds", 0, 1),
    (tokenizer.Settings, "vocab_size", 256, 257), (tokenizer.Settings, "rounds", 0, 1),
]  # fmt: skip
ALL = (*commandline.COMMANDS, data.Settings, decode.Settings, serve.Settings, tokenizer.Settings)
SAME = {config.Doctor: config.Base, config.Mid: config.Base, config.Sft: config.Mid, config.Rl: config.Mid}


@pytest.mark.parametrize(("cls", "name", "refused", "accepted"), RANGES)
def test_a_number_outside_its_range_is_refused(cls, name, refused, accepted):
    """On the command line and in code, in the same words."""
    low, high = (cls.__dataclass_fields__[name].metadata[key] for key in ("low", "high"))
    allowed = f"from {low} to {high}" if high < math.inf else f"at least {low}"
    for make in (lambda value: parse(cls, [f"--{name}={value}"]), lambda value: cls(**{name: value})):
        assert getattr(make(accepted), name) == accepted
        with pytest.raises(UserError, match=f"^--{name}={refused}: must be {allowed}") as error:
            make(refused)
        assert "\n" not in str(error.value)


def test_every_range_is_tested():
    tested = {(cls, name) for cls, name, *_ in RANGES}
    for cls in ALL:
        for field in limits(cls):
            parent = SAME.get(cls)
            inherited = parent and parent.__dataclass_fields__.get(field.name)
            if not field.metadata["choices"] and not (inherited and inherited.metadata == field.metadata):
                assert (cls, field.name) in tested, f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("cls", "flag", "words"),
    [(config.Base, "--num_iterations=-5", "must be at least 1, or -1"),
     (config.Base, "--device_batch_size=-1", "must be at least 1, or auto"),
     (config.Base, "--device_type=abacus", "must be cpu, gpu, cuda or tpu"),
     (config.Base, "--compute_dtype=float16", "must be bfloat16 or float32"),
     (config.Base, "--shard=both", "must be optimizer or full"),
     (config.Base, "--attention=flash", "must be cudnn or xla"),
     (config.Base, "--remat=some", "must be none, matmuls or full"),
     (config.Base, "--packing=whole", "must be split, crop or stream"),
     (config.Mid, "--source=best", "must be base, mid, sft or rl"), (config.Sft, "--source=best", "must be base, mid"),
     (config.Rl, "--source=best", "must be base, mid"), (config.BaseLoss, "--source=best", "must be base, mid"),
     (config.BaseEval, "--source=best", "must be base, mid"), (config.ChatEval, "--source=best", "must be base, mid"),
     (config.ChatCli, "--source=best", "must be base, mid"), (config.ChatWeb, "--source=best", "must be base, mid"),
     (config.ChatEval, "--split=both", "must be train, val or test"),
     (config.ChatWeb, "--device_type=x", "must be cpu, gpu")],
)  # fmt: skip
def test_a_wrong_choice_is_refused_by_a_list_of_the_right_ones(cls, flag, words):
    with pytest.raises(UserError, match=f"^{flag}: {words}"):
        parse(cls, [flag])


def test_every_choice_and_every_default_is_accepted(capsys):
    for cls in ALL:
        cls()
        for field in limits(cls):
            for choice in field.metadata["choices"]:
                assert getattr(cls(**{field.name: choice}), field.name) == choice
            cls(**{field.name: field.default})
            if field.metadata["auto"]:
                assert getattr(parse(cls, [f"--{field.name}=auto"]), field.name) == 0
        with pytest.raises(SystemExit):
            parse(cls, ["--help"])
        printed = capsys.readouterr().out
        for field in limits(cls):
            assert not field.metadata["choices"] or f"{{{','.join(field.metadata['choices'])}}}" in printed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_nan_or_infinite(value):
    for cls in ALL:
        for field in dataclasses.fields(cls):
            if field.type is float:
                bound = "(at least [01] and finite|from 0 to [12]|finite)"
                with pytest.raises(UserError, match=f"^--{field.name}={value}: must be {bound}"):
                    parse(cls, [f"--{field.name}={value}"])


def test_what_a_preset_sets_is_checked_unless_a_flag_replaces_it(preset):
    file = preset("[base]\nwarmup_ratio = 2\nremat = 'some'\n")
    with pytest.raises(UserError, match="--remat=some: must be none"):
        parse(config.Base, [file, "--warmup_ratio=0"])
    assert parse(config.Base, [file, "--warmup_ratio=0", "--remat=full"]).remat == "full"


def test_the_smallest_vocabulary_is_the_tokenizers_own():
    assert config.TokTrain.__dataclass_fields__["vocab_size"].metadata["low"] == 256 + len(SPECIAL_TOKENS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_there_without_importing_jax(script):
    stages = [f"--stage={s}" for s in config.STAGES] if script == "train" else [""]
    for stage in stages:
        command = [sys.executable, "-X", "importtime", "-m", f"scripts.{script}", *filter(None, [stage]), "--help"]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and "--config PRESET" in result.stdout
        imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
        assert not imported & {"jax", "flax", "pyarrow", "tiktoken", "fastapi"}


@pytest.mark.parametrize("arguments", [["--stage=best"], [], ["--stage=base", "--depth=x"]])
def test_scripts_complain_in_one_line_with_exit_code_2(arguments):
    command = [sys.executable, "-m", "scripts.train", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_errors_with_a_cause_outside_are_one_line_and_others_are_not_hidden(monkeypatch, capsys):
    def fails(code, path: str | None = "somewhere/file"):
        def main(cfg):
            raise OSError(code, os.strerror(code), path)

        return main

    monkeypatch.setattr(sys, "argv", ["command"])
    wanted = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EACCES: "give this user access",
              errno.EROFS: "set NANOCHAT_BASE_DIR", errno.EIO: "check the disk",
              errno.ENOENT: "put it back"}  # fmt: skip
    for code, advice in wanted.items():
        with pytest.raises(SystemExit, match="2"):
            commandline.run(fails(code), config.BaseLoss)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and advice in error
        assert os.strerror(code) in error and "somewhere/file" in error
    with pytest.raises(OSError, match="Invalid argument"):
        commandline.run(fails(errno.EINVAL), config.BaseLoss)
    for path in (None, str(REPOSITORY / "nanochat_jax" / "no" / "such.txt")):
        with pytest.raises(FileNotFoundError):
            commandline.run(fails(errno.ENOENT, path), config.BaseLoss)


def test_a_broken_pipe_that_is_not_the_output_is_not_hidden(monkeypatch):
    def main(cfg):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb", buffering=0) as pipe:
            pipe.write(b"to a program that has ended")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(BrokenPipeError):
        commandline.run(main, config.BaseLoss)


# -----------------------------------------------------------------------------
# Other names, unknown names, special values

# Every flag of the original nanochat, by the command that has it here. A value that differs from its default.
BASE = {
    "run": "x", "device_type": "cpu", "depth": 4, "max_seq_len": 512, "num_iterations": 7, "target_flops": 1e9,
    "target_param_data_ratio": 8, "device_batch_size": 4, "total_batch_size": 1024, "embedding_lr": 0.1,
    "unembedding_lr": 0.001, "weight_decay": 0.1, "matrix_lr": 0.01, "grad_clip": 1.0, "warmup_ratio": 0.1,
    "warmdown_ratio": 0.4, "final_lr_frac": 0.1, "eval_every": 100, "eval_tokens": 1024, "core_metric_every": 100,
    "core_metric_max_per_task": -1, "sample_every": 100, "save_every": 100, "model_tag": "x",
    "aspect_ratio": 128, "head_dim": 64, "window_pattern": "SSSL",
}  # fmt: skip
CHAT = {
    "run": "x", "device_type": "cpu", "dtype": "float32", "num_iterations": 7, "embedding_lr": 0.1,
    "unembedding_lr": 0.001, "matrix_lr": 0.01, "init_lr_frac": 0.5, "weight_decay": 0.1, "eval_every": 70,
    "dry_run": 1, "model_tag": "x", "source": "rl", "device_batch_size": 2,
}  # fmt: skip
LOADED = {"model_tag": "x", "step": 7, "device_type": "cpu"}
ORIGINAL = [
    (config.TokTrain, {"max_chars": 1e9, "doc_cap": 100, "vocab_size": 4096}),
    (config.Dataset, {"num_files": 240, "num_workers": 8}), (config.Base, BASE),
    (config.Mid, CHAT | {"total_batch_size": 1024, "eval_tokens": 1024}),
    (config.Sft, CHAT | {"target_examples_per_step": 16, "num_epochs": 2, "eval_metrics_every": 50,
                         "eval_metrics_max_problems": 10}),
    (config.Rl, CHAT | {"examples_per_step": 8, "num_samples": 8, "max_new_tokens": 64, "temperature": 0.7, "top_k": 5,
                        "num_epochs": 2, "save_every": 5, "eval_examples": 100}),
    (config.BaseEval, LOADED | {"max_per_task": 100, "device_batch_size": 16}),
    (config.BaseLoss, LOADED | {"device_batch_size": 16, "split_tokens": 1024}),
    (config.ChatEval, LOADED | {"source": "rl", "task_name": "GSM8K", "dtype": "float32", "temperature": 0.5,
                                "max_new_tokens": 64, "num_samples": 2, "top_k": 5, "batch_size": 4,
                                "max_problems": 9}),
    (config.ChatCli, LOADED | {"source": "rl", "prompt": "hi", "temperature": 0.1, "top_k": 5, "dtype": "float32"}),
    (config.ChatWeb, LOADED | {"num_gpus": 2, "source": "rl", "temperature": 0.1, "top_k": 5, "max_tokens": 64,
                               "port": 80, "dtype": "float32", "host": "0.0.0.0"}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "flags"), ORIGINAL, ids=lambda value: getattr(value, "__name__", ""))
def test_every_flag_of_the_original_is_accepted_and_means_the_same(cls, flags):
    """Written with underscores as its configurator does, and with dashes as its argparse does."""
    default = cls()
    for dash in (False, True):
        cfg = parse(cls, [f"--{name.replace('_', '-') if dash else name}={value}" for name, value in flags.items()])
        for name, value in flags.items():
            ours = commandline.SYNONYMS.get(name, name)
            assert getattr(cfg, ours) == value != getattr(default, ours), name


@pytest.mark.parametrize(
    ("cls", "argv", "expected"),
    [(config.ChatEval, "-i sft -a GSM8K -d float32 -t 1 -m 9 -n 2 -k 3 -b 4 -g x -s 5 -x 6",
      {"source": "sft", "task_name": "GSM8K", "compute_dtype": "float32", "temperature": 1, "max_new_tokens": 9,
       "num_samples": 2, "top_k": 3, "batch_size": 4, "model_tag": "x", "step": 5, "max_problems": 6}),
     (config.ChatCli, "-i mid -g x -s 5 -p hi -t 1 -k 3 -d float32",
      {"source": "mid", "model_tag": "x", "step": 5, "prompt": "hi", "temperature": 1, "top_k": 3,
       "compute_dtype": "float32"}),
     (config.ChatWeb, "-n 2 -i mid -t 1 -k 3 -m 9 -g x -s 5 -p 80 -d float32",
      {"num_gpus": 2, "source": "mid", "temperature": 1, "top_k": 3, "max_new_tokens": 9, "model_tag": "x", "step": 5,
       "port": 80, "compute_dtype": "float32"}),
     (config.Dataset, "-n 240 -w 8", {"num_files": 240, "num_workers": 8})],
)  # fmt: skip
def test_every_short_flag_of_the_original(cls, argv, expected):
    cfg = parse(cls, argv.split())
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("cls", "argument", "words"),
    [(config.Base, "--dept=3", "--dept=3: unknown flag; did you mean --depth?"),
     (config.ChatEval, "--max-problem=3", "--max_problem=3: unknown flag; did you mean --max_problems?"),
     (config.Sft, "--packing=crop", "--packing=crop: not a flag of this command, but of --stage=base, scripts.doctor"),
     (config.Base, "--examples_per_step=8", "--examples_per_step=8: not a flag of this command, but of --stage=rl"),
     (config.ChatCli, "-x", "-x: unknown flag; the short flags here are .*-t (--temperature)"),
     (config.Base, "-depth=20", "-depth=20: write --depth=20"),
     (config.Base, "-max-seq-len", "-max-seq-len: write --max_seq_len"),
     (config.Base, "config/mine.py", "config/mine.py: not a flag; write --config=config/mine.py"),
     (config.Base, "depth=20", "depth=20: not a flag; write --NAME=VALUE"),
     (config.Base, "--banana", "--banana: unknown flag; did you mean --data? (see --help)"),
     (config.Base, "--learning-rate=0.1", "--learning_rate=0.1: not a flag here; use --matrix_lr"),
     (config.Sft, "--lr=0.1", "--lr=0.1: not a flag here; use --matrix_lr"),
     (config.Base, "--batch_size=4", "--batch_size=4: not a flag here; use --device_batch_size"),
     (config.Base, "--max_steps=4", "--max_steps=4: not a flag here; use --num_iterations"),
     (config.Base, "--epochs=4", "--epochs=4: not a flag here; use --num_iterations"),
     (config.Sft, "--epochs=4", "--epochs=4: not a flag here; use --num_epochs"),
     (config.Base, "--compile", "--compile: not a flag here: every step is compiled"),
     (config.Mid, "--eval_steps=100", "--eval_steps=100: not a flag here; use --eval_tokens"),
     (config.Base, "--warmup-steps=40", "--warmup_steps=40: not a flag here; use --warmup_ratio"),
     (config.BaseEval, "--hf-path=gpt2", "--hf_path=gpt2: not a flag here: only checkpoints of this project"),
     (config.Base, "--fp8", "--fp8: not a flag here: matmuls are in bfloat16 or float32")],
)  # fmt: skip
def test_an_unknown_flag_gets_the_nearest_or_its_owner(cls, argument, words):
    with pytest.raises(UserError) as error:
        parse(cls, [argument])
    pattern = words.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    assert re.match(pattern, str(error.value)) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [("depht = 3", "depht: unknown setting; did you mean depth?"),
     ("[bsae]\ndepth = 3", "bsae: unknown setting; did you mean base?"),
     ("[sft]\neval_tokens = 5", "[sft] eval_tokens: not a setting here; use eval_examples"),
     ("eval_steps = 5", "eval_steps: not a setting here; use eval_examples or eval_tokens"),
     ("[base]\nfp8 = true", "[base] fp8: not a setting here: matmuls are in bfloat16"),
     ("[mid]\npacking = 'crop'", "[mid] packing: unknown setting; it belongs in [base]"),
     ("depth = '20'", "depth = '20': write it without quotes"), ("tok.fresh = 'true'", "fresh = 'true': write it with"),
     ("matrix_lr = '1e-3'", "matrix_lr = '1e-3': write it without quotes"),
     ("mixture = {gsm8k = '0'}", "mixture = {'gsm8k': '0'}: write it without quotes"),
     ("depth = [20]", "depth = [20] is not an integer"), ("depth = 1979-05-27", "is not an integer"),
     ("[sft]\nsource = 'sfft'", "--source=sfft: must be base, mid, sft or rl; did you mean sft?"),
     ("dtype = 'float23'", "--compute_dtype=float23: must be bfloat16 or float32; did you mean float32?")],
)  # fmt: skip
def test_a_wrong_key_or_value_of_a_preset_is_one_line(preset, text, words):
    with pytest.raises(UserError) as error:
        for cls in (config.Base, config.Mid, config.Sft, config.TokTrain):
            parse(cls, [preset(text)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_a_preset_keep_their_meaning(preset):
    text = "depth = 4.0\ntotal_batch_size = 1e6\ndevice_batch_size = 'auto'\ndtype = 'float32'\nmodel_tag = '20'\n"
    cfg = parse(config.Base, [preset(text)])
    assert (cfg.depth, cfg.total_batch_size, cfg.device_batch_size) == (4, 1_000_000, 0)
    assert (cfg.compute_dtype, cfg.model_tag) == ("float32", "20")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--stage=sfft"], "--stage=sfft: must be one of base, mid, sft, rl; did you mean sft?"),
     (["--stage=base", "--stage", "bas"], "--stage=bas: must be one of"),
     (["--stage=base", "--stage=sft", "--packing=crop"], "--packing=crop: not a flag of this command, but of"),
     (["--stage"], "--stage=: must be one of")],
)  # fmt: skip
def test_a_wrong_stage_gets_the_nearest_and_the_last_wins(arguments, words):
    command = [sys.executable, "-m", "scripts.train", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
