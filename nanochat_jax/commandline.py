"""Parses the command line into one of the settings dataclasses of config/.

Flags override the preset file (`--config NAME` or `--config PATH`), and the preset file overrides the defaults of the
dataclass. A key at the top of a preset file applies to all commands that have this setting. A key in one of the tables
[tok] [dataset] [base] [mid] [sft] [rl] [eval] [chat] applies only to the commands of that table. A key that no command
knows is an error.

Flags may be written with dashes or underscores. If a flag is repeated, its last value wins. A lone `--` is ignored.
This module does not import JAX, so `--help` and errors in flags appear without delay.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat_jax import config
from nanochat_jax.config import REPOSITORY, UserError

COMMANDS = (
    config.TokTrain, config.TokEval, config.Dataset, config.Base, config.Doctor, config.Mid,
    config.Sft, config.Rl, config.BaseLoss, config.BaseEval, config.ChatEval, config.ChatCli, config.ChatWeb,
)  # fmt: skip
SHORT = {
    "source": "i", "task_name": "a", "temperature": "t", "max_new_tokens": "m", "num_samples": "n", "top_k": "k",
    "batch_size": "b", "model_tag": "g", "step": "s", "max_problems": "x", "prompt": "p", "compute_dtype": "d",
    "num_files": "n", "num_workers": "w", "num_gpus": "n", "port": "p",
}  # fmt: skip

C = TypeVar("C", bound=config.Settings)


def parse(cls: type[C], argv: list[str] | None = None) -> C:
    """Builds an instance of `cls` from the flags, the preset that --config names, and the defaults of `cls`.

    Raises UserError if a flag, a value or the preset is invalid.
    """
    args = [_with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv) if arg != "--"]
    given = vars(_parser(cls).parse_args(args))
    preset = given.pop("config", None)
    values = _preset_values(cls, preset)
    if preset and "preset" in cls.__dataclass_fields__:
        values["preset"] = find_preset(preset).stem
    return cls(**values | {name: value for name, value in given.items() if value is not None})


def run(main: Callable[[C], object], cls: type[C]) -> None:
    """Parses the command line into `cls`, and passes the settings to `main`.

    On a UserError or a full disk, prints one line and exits with status 2. On Ctrl-C, exits with status 130. Any other
    error is a bug, so its traceback is shown.
    """
    try:
        main(parse(cls))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}: make room and run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # Python needs a while to end JAX. Another Ctrl-C then ends the program at once, without a traceback or a crash.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("stopped", file=sys.stderr)
        sys.exit(130)


# -----------------------------------------------------------------------------
# Flags


def _with_underscores(arg: str) -> str:
    """Replaces dashes in the name of a flag: --max-seq-len=5 -> --max_seq_len=5."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for an invalid flag instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _parser(cls: type[config.Settings]) -> _Parser:
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name}" if module else None
    parser = _Parser(prog=getattr(cls, "prog", prog), description=cls.__doc__, allow_abbrev=False)
    if cls in COMMANDS:  # benchmarks and the report take no presets
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
        parser.add_argument(*flags, default=None, dest=field.name, **options)
    return parser


def _kinds(cls: type[config.Settings]) -> dict[str, type]:
    """Returns the type of each setting. For `str | None`, where None means that the flag is absent, this is str."""
    hints = typing.get_type_hints(cls)
    return {name: kind.__args__[0] if isinstance(kind, types.UnionType) else kind for name, kind in hints.items()}


def _show(default: object) -> str:
    """{"gsm8k": 0, "mmlu": 5} -> gsm8k=0,mmlu=5"""
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
        mixture = "a list of name=rows, each name once, like gsm8k=0,identity=30"
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
        name, equals, rows = part.partition("=")
        if not equals or name in mixture:
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
    fields = {
        command: field
        for command in owners
        for field in dataclasses.fields(command)
        if field.name == key and "help" in field.metadata
    }
    if not fields:
        names = {field.name for c in owners for field in dataclasses.fields(c) if "help" in field.metadata}
        similar = difflib.get_close_matches(key, names, 1)
        raise UserError(f"{where}: unknown setting" + (f"; did you mean {similar[0]}?" if similar else ""))
    if cls not in fields:
        return {}
    try:
        return {key: _convert_for(value, fields[cls], _kinds(cls)[key])}
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where} = {error}") from None
