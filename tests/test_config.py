"""Settings: what wins over what, and every mistake in one line that names the flag."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from nanochat_jax import commandline, config
from nanochat_jax.commandline import parse
from nanochat_jax.config import REPOSITORY, UserError

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
    with pytest.raises(UserError, match=r"below cannot be made \(Not a directory\): set NANOCHAT_BASE_DIR to"):
        config.base_dir()


def test_a_python_without_the_packages_is_told_from_the_right_one():
    command = [sys.executable, "-S", "-m", "scripts.train"]  # -S: without what is installed
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "has no jax: source .venv/bin/activate" in done.stderr


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
    class Settings:
        table = "base"
        rows: int = config.setting(0, "rows at once", auto=True)
        cars: int = config.setting(3, "automobiles")

    assert parse(Settings, ["--rows=auto"]).rows == 0
    with pytest.raises(UserError, match="--cars: 'auto' is not an integer"):
        parse(Settings, ["--cars=auto"])
    with pytest.raises(UserError, match="--device_batch_size: 'auto' is not an integer"):
        parse(config.Rl, ["--device_batch_size=auto"])
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    said = capsys.readouterr().out
    assert "rows at once [auto]" in said and "automobiles [3]" in said


def test_mixtures_on_the_command_line():
    assert parse(config.Sft, ["--mixture=gsm8k=0,identity=30"]).mixture == {"gsm8k": 0, "identity": 30}
    for wrong in ("gsm8k", "gsm8k=x", "gsm8k=1=2"):
        with pytest.raises(UserError, match=f"--mixture: '{wrong}' is not rows by name, each once, like gsm8k=0,"):
            parse(config.Sft, [f"--mixture={wrong}"])


def test_switches_are_true_alone_or_as_they_say():
    for flags, value in (([], False), (["--fresh"], True), (["--fresh=no"], False), (["--fresh", "TRUE"], True)):
        assert parse(config.TokTrain, flags).fresh is value


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_good_for_every_command(name):
    for cls in commandline.COMMANDS:
        parse(cls, [f"--config={name}"])
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
     ("matrix_lr = true", "matrix_lr = True is not a number"), ("data = 3", "data = 3 is not a text"),
     ("mid.mixture = 3", "mixture = 3 is not rows by name"), ("mixture = {a = 1.5}", "is not rows by name"),
     ("tok.fresh = 'perhaps'", "fresh = 'perhaps' is not true or false")],
)  # fmt: skip
def test_wrong_presets_are_named(preset, text, words):
    with pytest.raises(UserError, match=words):
        for cls in (config.Base, config.Mid, config.TokTrain):
            parse(cls, [preset(text)])


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


def test_a_full_disk_is_one_line_and_other_errors_are_not_hidden(monkeypatch, capsys):
    def fails(code):
        def main(cfg):
            raise OSError(code, os.strerror(code), "somewhere/file")

        return main

    monkeypatch.setattr(sys, "argv", ["command"])
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(SystemExit, match="2"):
            commandline.run(fails(code), config.BaseLoss)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and os.strerror(code) in said and "somewhere/file" in said and "make room" in said
    with pytest.raises(PermissionError):
        commandline.run(fails(errno.EACCES), config.BaseLoss)
