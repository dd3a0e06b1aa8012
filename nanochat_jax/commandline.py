"""Parses the command line into one of the settings dataclasses of config/.

Flags override the preset file (`--config NAME` or `--config PATH`), and the preset file overrides the defaults of the
dataclass. A key at the top of a preset file applies to all commands that have a setting of this name. A key in one of
the tables [tok] [dataset] [base] [mid] [sft] [rl] [eval] [chat] [report] applies only to the commands of that table. A
key that no command knows is an error.

Names of flags may be written with dashes or underscores. If a flag is repeated, its last value wins. A lone `--` is
ignored. This module does not import JAX, so `--help` and errors in flags appear without delay.
"""

import argparse
import dataclasses
import functools
import os
import re
import select
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat_jax import config
from nanochat_jax.config import REPOSITORY, UserError, did_you_mean
from nanochat_jax.stop_signals import StopSignals, was_interrupted

COMMANDS = (
    config.TokTrain, config.TokEval, config.Dataset, config.Base, config.Doctor, config.Mid,
    config.Sft, config.Rl, config.BaseLoss, config.BaseEval, config.ChatEval, config.ChatCli, config.ChatWeb,
    config.Report,
)  # fmt: skip
MODULES: dict[type[config.Settings], str] = {
    config.TokTrain: "scripts.tok_train", config.TokEval: "scripts.tok_eval", config.Dataset: "nanochat_jax.dataset",
    config.Doctor: "scripts.doctor", config.BaseLoss: "scripts.base_loss", config.BaseEval: "scripts.base_eval",
    config.ChatEval: "scripts.chat_eval", config.ChatCli: "scripts.chat_cli", config.ChatWeb: "scripts.chat_web",
    config.Report: "nanochat_jax.report",
}  # fmt: skip
SHORT = {
    "source": "i", "task_name": "a", "temperature": "t", "max_new_tokens": "m", "num_samples": "n", "top_k": "k",
    "batch_size": "b", "model_tag": "g", "step": "s", "max_problems": "x", "prompt": "p", "compute_dtype": "d",
    "num_files": "n", "num_workers": "w", "num_gpus": "n", "port": "p",
}  # fmt: skip

# Names from the original nanochat that flags and presets also accept: {original name: our name}.
SYNONYMS = {"dtype": "compute_dtype", "max_tokens": "max_new_tokens", "resume_from_step": "resume"}
# Settings of the original nanochat that are refused: {name: our settings for the same purpose}.
RENAMED = {
    "eval_steps": ("eval_examples", "eval_tokens"), "step": ("source_step",), "warmup_steps": ("warmup_ratio",),
    "chatcore_every": ("eval_metrics_every",), "chatcore_max_cat": ("eval_metrics_max_problems",),
    "chatcore_max_sample": ("eval_metrics_max_problems",), "eval_tokens": ("eval_examples",),
    # Names from other libraries.
    "learning_rate": ("matrix_lr",), "lr": ("matrix_lr",), "batch_size": ("device_batch_size",),
    "max_steps": ("num_iterations",), "epochs": ("num_epochs", "num_iterations"),
    "num_train_epochs": ("num_epochs", "num_iterations"),
}  # fmt: skip
# Settings of the original nanochat that have no counterpart here: {name: reason}.
ABSENT = {
    "hf_path": "only checkpoints of this project can be evaluated",
    "eval": "scripts.base_eval evaluates CORE, and scripts.base_loss bits per byte and samples",
    "compile": "every step is compiled",
    "fp8": "matmuls are in bfloat16 or float32",
    "fp8_recipe": "matmuls are in bfloat16 or float32",
    "scalar_lr": "this model has no scalar weights",
    "load_optimizer": "every stage starts with a new optimizer state",
}

C = TypeVar("C", bound=config.Settings)


def parse(cls: type[C], argv: list[str] | None = None) -> C:
    """Builds an instance of `cls` from the flags, the preset that --config names, and the defaults of `cls`.

    Raises UserError if a flag, a value or the preset is invalid.
    """
    args = [_with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv) if arg != "--"]
    parser = _parser(cls)
    _refuse_single_dash(args, _flags_of(cls))
    parsed, unknown = parser.parse_known_args(args)
    if unknown:
        raise UserError(_unknown(cls, unknown))
    given = vars(parsed)
    preset = given.pop("config", None)
    values = _preset_values(cls, preset)
    if preset and "preset" in cls.__dataclass_fields__:
        values["preset"] = find_preset(preset).stem
    if preset and "preset_path" in cls.__dataclass_fields__:
        values["preset_path"] = str(find_preset(preset))
    return cls(**values | {name: value for name, value in given.items() if value is not None})


def run(main: Callable[[C], object], cls: type[C]) -> None:
    """Parses the command line into `cls`, and passes the settings to `main`.

    On a UserError, or if the disk is full or a file cannot be reached, prints one line and exits with status 2. Any
    other error is a bug, so its traceback is shown. On Ctrl-C, SIGTERM or SIGHUP, exits with status 128 + the signal's
    number.
    """
    signals = StopSignals()
    try:
        main(parse(cls))
    except BaseException as error:
        if not signals.ended_by and was_interrupted(error):
            signals.end(signal.SIGINT)
        if signals.ended_by:  # some libraries replace the exception that a signal raises by one of their own
            sys.exit(128 + signals.ended_by)
        if isinstance(error, BrokenPipeError) and _has_lost_reader(1):  # the reader, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not fail when it flushes stdout at exit
            sys.exit(128 + signal.SIGPIPE)
        advice = f": {config.advice_for(error)}" if isinstance(error, OSError) and config.advice_for(error) else ""
        if not isinstance(error, UserError) and not advice:
            raise
        print(f"error: {_with_preset(str(error))}{advice}", file=sys.stderr)
        sys.exit(2)


def _has_lost_reader(descriptor: int) -> bool:
    """Whether the file descriptor is a pipe or a socket whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _with_preset(message: str) -> str:
    """Adds the --config of this command to the commands that an error message suggests."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    given.add_argument("--config")
    try:
        preset = given.parse_known_args(sys.argv[1:])[0].config
    except argparse.ArgumentError:  # --config without a value
        preset = None
    if not preset:
        return message
    message = re.sub(r"( -m (?:scripts|nanochat_jax)\.\w+[^:;,()]*?) --config=\S+", r"\1", message)
    return re.sub(r" -m (?:scripts|nanochat_jax)\.(?!bench)\w+", lambda hint: f"{hint[0]} --config={preset}", message)


# -----------------------------------------------------------------------------
# Flags


def _with_underscores(arg: str) -> str:
    """Replaces dashes in the name of a flag: --max-seq-len=5 -> --max_seq_len=5."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _flags_of(cls: type[config.Settings]) -> list[str]:
    """Returns the names of the flags of a command: ["depth", "seed", ...]."""
    fields = [field for field in dataclasses.fields(cls) if "help" in field.metadata]
    names = [field.name for field in fields if not field.metadata["positional"]]
    return [*names, "config"] if cls in COMMANDS else names


def _refuse_single_dash(args: list[str], names: list[str]) -> None:
    """Raises UserError for a long flag with one dash. argparse would read -depth=20 as -d with the value epth=20."""
    for arg in args:
        name, equals, value = arg[1:].replace("-", "_").partition("=")
        if re.match(r"-\w\w", arg) and name in names:
            raise UserError(f"{arg}: write --{name}{equals}{value}")


def _unknown(cls: type[config.Settings], args: list[str]) -> str:
    """Returns an error message about the first flag in `args`, which are the arguments that `cls` does not know."""
    flag = next((arg for arg in args if arg.startswith("-") and len(arg) > 1), None)
    if flag is None:
        hint = f"--config={args[0]}" if args[0].endswith((".toml", ".py")) else "--NAME=VALUE"
        return f"{args[0]}: not a flag; write {hint} (see --help)"
    names = _flags_of(cls)
    if not flag.startswith("--"):
        known = ", ".join(f"-{SHORT[name]} (--{name})" for name in names if name in SHORT) or "none"
        return f"{flag}: unknown flag; the short flags here are {known} (see --help)"
    name = flag[2:].partition("=")[0]
    for ours in RENAMED.get(name, ()):
        if ours in names:
            return f"{flag}: not a flag here; use --{ours} (see --help)"
    if name in ABSENT:
        return f"{flag}: not a flag here: {ABSENT[name]}"
    if owners := _owners(name):
        return f"{flag}: not a flag of this command, but of {owners} (see --help)"
    similar = did_you_mean(name, names, cutoff=0).replace("mean ", "mean --")
    return f"{flag}: unknown flag{similar} (see --help)"


def _owners(name: str) -> str:
    """Returns the commands that have the setting `name`, such as "--stage=base, scripts.doctor"."""
    return ", ".join(command_of(cls) for cls in COMMANDS if name in _flags_of(cls))


def command_of(cls: type[config.Settings]) -> str:
    """Returns the name of the command whose settings are `cls`, such as "--stage=base" or "scripts.tok_train"."""
    if issubclass(cls, config.Train) and cls is not config.Doctor:
        return f"--stage={cls.table}"
    return MODULES[cls]


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for an invalid flag instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _parser(cls: type[config.Settings]) -> _Parser:
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name}" if module else None
    parser = _Parser(prog=getattr(cls, "prog", prog), description=cls.__doc__, allow_abbrev=False)
    if cls in COMMANDS:  # benchmarks take no presets
        parser.add_argument("--config", metavar="PRESET", help="preset: a name in configs/ or a path to a TOML file")
    kinds, defaults = _kinds(cls), cls()
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        kind, default, choices = kinds[field.name], getattr(defaults, field.name), field.metadata["choices"]
        auto = field.metadata["auto"] and not default
        shown = " [auto]" if auto else "" if default in (None, "", {}) else f" [{_show(default)}]"
        options: dict[str, Any] = {
            "type": functools.partial(_convert_for, field=field, kind=kind),
            "metavar": f"{{{','.join(choices)}}}" if choices else kind.__name__.upper(),
            "help": (field.metadata["help"] + shown).replace("%", "%%"),
        }
        if field.metadata["positional"]:
            parser.add_argument(field.name, **options)
            continue
        if kind is bool:  # a flag without a value means true
            options |= {"nargs": "?", "const": True}
        flags = [f"--{field.name}"]
        if field.name in SHORT and not (field.name == "num_samples" and cls is config.Rl):
            flags.insert(0, f"-{SHORT[field.name]}")
        flags += [f"--{synonym}" for synonym, ours in SYNONYMS.items() if ours == field.name]
        parser.add_argument(*flags, default=None, dest=field.name, **options)
    return parser


def _kinds(cls: type[config.Settings]) -> dict[str, type]:
    """Returns the type of each setting. `str | None` becomes str, because None only means that the flag is absent."""
    hints = typing.get_type_hints(cls)
    return {name: kind.__args__[0] if isinstance(kind, types.UnionType) else kind for name, kind in hints.items()}


def _show(default: object) -> str:
    """Formats a default for the help: {"gsm8k": 0, "mmlu": 5} -> gsm8k=0,mmlu=5."""
    return ",".join(f"{k}={v}" for k, v in default.items()) if isinstance(default, dict) else str(default)


# -----------------------------------------------------------------------------
# Values


def _convert_for(value: object, field: dataclasses.Field, kind: type) -> object:
    """Converts a value from a flag or a TOML file to `kind`, which is the type of `field`.

    Raises ArgumentTypeError if the value cannot be converted. argparse adds the flag's name to the message.
    """
    try:
        if kind is bool:
            return _to_bool(value)
        if kind is int:
            return 0 if field.metadata["auto"] and value == "auto" else _to_int(value)
        if kind is float:
            return _to_float(value)
        if kind is str:
            return _to_str(value)
        return _to_mixture(value)
    except ValueError:
        expected = {int: "an integer, like 8", float: "a number, like 0.1", bool: "true or false", str: "a string"}
        mixture = "a list of name=rows, each name once, like gsm8k=0,identity=30 (0: all rows)"
        raise argparse.ArgumentTypeError(f"{value!r} is not {expected.get(kind, mixture)}") from None


def _to_bool(value: object) -> bool:
    """ "yes" -> True"""
    text = str(value).lower()
    if text not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(value)
    return text in ("true", "1", "yes")


def _to_int(value: object) -> int:
    """ "1e9" -> 1000000000"""
    number = float(str(value))
    if not number.is_integer():  # this also refuses infinity and NaN
        raise ValueError(value)
    try:
        return int(str(value))  # int(number) would be inexact above 2**53
    except ValueError:
        return int(number)


def _to_float(value: object) -> float:
    """ "1e-3" -> 0.001. Raises ValueError for True and False, although float() would accept them."""
    return float(str(value))


def _to_str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _to_mixture(value: object) -> dict[str, int]:
    """ "gsm8k=0,identity=30" -> {"gsm8k": 0, "identity": 30}. Also accepts a TOML table."""
    if isinstance(value, dict):
        return {str(name): _to_int(rows) for name, rows in value.items()}
    mixture = {}
    for part in filter(None, _to_str(value).split(",")):
        name, equals, rows = part.rpartition("=")  # PATH in customjson:PATH may contain "="
        if not equals or name in mixture or "=" in name.partition(":")[0]:
            raise ValueError(value)
        mixture[name] = _to_int(rows)
    return mixture


# -----------------------------------------------------------------------------
# Presets


def find_preset(name: str) -> Path:
    """Returns the path of configs/<name>.toml if that file exists, else `name` as a path.

    Raises UserError, with a list of the presets, if neither file exists.
    """
    for path in (REPOSITORY / "configs" / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    presets = ", ".join(sorted(path.stem for path in (REPOSITORY / "configs").glob("*.toml")))
    raise UserError(f"--config={name}: no such preset or file; the presets are {presets}")


def _preset_values(cls: type[config.Settings], name: str | None) -> dict[str, Any]:
    """Returns the values that the preset `name` sets for the fields of `cls`.

    Raises UserError if the file is not valid TOML or has a key that no command knows.
    """
    if not name:
        return {}
    path = find_preset(name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {config.first_line(error)}") from None
    tables = {command.table for command in COMMANDS}
    common, own = {}, {}
    for key, value in document.items():
        if key in tables and isinstance(value, dict):
            owners = [command for command in COMMANDS if command.table == key]
            for name, inner in value.items():
                own |= _value_for(cls, owners, name, inner, f"{path}: [{key}] {name}")
        else:
            common |= _value_for(cls, COMMANDS, key, value, f"{path}: {key}")
    return common | own  # a key in the command's table overrides the same key at the top of the file


def _value_for(
    cls: type[config.Settings], owners: Iterable[type[config.Settings]], key: str, value: object, where: str
) -> dict[str, Any]:
    """Returns {key: converted value}, or {} if the key does not apply to `cls`.

    `owners` are the commands of the table that holds the key, or all commands if the key is at the top of the file.
    Raises UserError if none of these commands has the setting `key`, or if the value has the wrong type.
    """
    key = SYNONYMS.get(key, key)
    fields = {
        command: field
        for command in owners
        for field in dataclasses.fields(command)
        if field.name == key and "help" in field.metadata
    }
    if not fields:
        raise UserError(f"{where}: {_unknown_setting(owners, key, value)}")
    if cls not in fields:
        return {}
    kind = _kinds(cls)[key]
    try:
        if kind is not str and _has_quotes(value) and not (fields[cls].metadata["auto"] and value == "auto"):
            raise argparse.ArgumentTypeError(f"{value!r}: write it without quotes")
        return {key: _convert_for(value, fields[cls], kind)}
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where} = {error}") from None


def _has_quotes(value: object) -> bool:
    """Whether a TOML value contains a number, true or false in quotes, like depth = "20"."""
    if isinstance(value, dict):
        return any(_has_quotes(inner) for inner in value.values())
    return isinstance(value, str) and re.fullmatch(r"[-+.\de]*\d[-+.\de]*|true|false", value.strip(), re.I) is not None


def _unknown_setting(owners: Iterable[type[config.Settings]], key: str, value: object) -> str:
    """Returns an error message about a key that is not a setting of the commands `owners`."""
    names = {name for command in owners for name in _flags_of(command)} - {"config"}
    if ours := [name for name in RENAMED.get(key, ()) if name in names]:
        return f"not a setting here; use {' or '.join(ours)}"
    if key in ABSENT:
        return f"not a setting here: {ABSENT[key]}"
    if places := list(dict.fromkeys(f"[{command.table}]" for command in COMMANDS if key in _flags_of(command))):
        return f"unknown setting; it belongs in {' or '.join(places)}"
    tables = {command.table for command in COMMANDS} if isinstance(value, dict) else set()
    return f"unknown setting{did_you_mean(key, sorted(names | tables))}"
