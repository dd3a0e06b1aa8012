"""From the command line to one of the settings of config.py.

Dataclass defaults < preset file (`--config cpu` or a path) < command line. A preset holds common keys at its top and
the tables [tok] [base] [mid] [sft] [rl] [eval] [chat]; a key that no command knows is an error. Flags may be written
with dashes or underscores, the last of a repeated flag wins, and a lone `--` is ignored. Nothing here imports JAX, so
that `--help` and every complaint about a flag are immediate.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import math
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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

C = TypeVar("C")


def parse(cls: type[C], argv: list[str] | None = None) -> C:
    """Builds `cls` from its defaults, the preset named by --config, and the flags. UserError names what is wrong."""
    args = [_plain(a) for a in (sys.argv[1:] if argv is None else argv) if a != "--"]
    given = vars(_parser(cls).parse_args(args))
    preset = given.pop("config", None)
    values = _preset(cls, preset)
    if preset and "preset" in cls.__dataclass_fields__:
        values["preset"] = find_preset(preset).stem
    return cls(**values | {k: v for k, v in given.items() if v is not None})


def run(main: Callable[[C], object], cls: type[C]) -> None:
    """Runs a script: what the user can mend is one line and exit code 2, Ctrl-C is 130, a bug is a traceback."""
    try:
        main(parse(cls))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}: make room and give the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _plain(arg: str) -> str:
    """--max-seq-len=5 -> --max_seq_len=5"""
    if not arg.startswith("--"):
        return arg
    flag, eq, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + eq + value


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError: one line instead of the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def _parser(cls: type) -> _Parser:
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name}" if module else None
    parser = _Parser(prog=getattr(cls, "prog", prog), description=cls.__doc__, allow_abbrev=False)
    if cls in COMMANDS:  # presets are for the pipeline, not for benchmarks
        parser.add_argument("--config", metavar="PRESET", help="preset: a name in configs/ or a path to a TOML file")
    types, defaults = typing.get_type_hints(cls), cls()
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        default = getattr(defaults, field.name)
        flags = [f"--{field.name}"]
        if field.name in SHORT and not (field.name == "num_samples" and cls is config.Rl):
            flags.insert(0, f"-{SHORT[field.name]}")
        text = field.metadata["help"]
        auto = field.metadata["auto"] and not default
        shown = " [auto]" if auto else "" if default in ("", {}) else f" [{_show(default)}]"
        extra = {"nargs": "?", "const": True} if types[field.name] is bool else {}
        parser.add_argument(
            *flags, type=functools.partial(_read, field=field, kind=types[field.name]), default=None, dest=field.name,
            metavar=types[field.name].__name__.upper(), help=(text + shown).replace("%", "%%"), **extra,
        )  # fmt: skip
    return parser


def _show(value) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


_WANTED = {int: "an integer, like 8", float: "a number, like 0.1", bool: "true or false", str: "a text"}


def _read(value, field: dataclasses.Field, kind: type):
    """`value` (text of a flag, or a TOML value) for `field`. The complaint is argparse's kind, which names the flag."""
    try:
        return _convert(value, kind, auto=field.metadata["auto"])
    except (ValueError, TypeError, LookupError, AttributeError):
        wanted = _WANTED.get(kind, "rows by name, each once, like gsm8k=0,identity=30")
        raise argparse.ArgumentTypeError(f"{value!r} is not {wanted}") from None


def _convert(value, kind: type, auto: bool):
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise TypeError(value)
    if kind is int:
        if auto and value == "auto":
            return 0
        number = float(value)  # 1e9 and 2_000 are integers too
        if not math.isfinite(number) or number != int(number):
            raise ValueError(value)
        return int(str(value)) if str(value).lstrip("-").isdigit() else int(number)
    if kind in (float, str):
        return kind(value)
    if isinstance(value, str):  # a mixture on the command line
        pairs = [part.split("=") for part in value.split(",") if part]
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError(value)
    return {name: _convert(rows, int, auto=False) for name, rows in value.items()}


def find_preset(name: str) -> Path:
    """configs/<name>.toml, or the path itself. UserError lists the presets there are."""
    for path in (REPOSITORY / "configs" / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    there = ", ".join(sorted(p.stem for p in (REPOSITORY / "configs").glob("*.toml")))
    raise UserError(f"--config={name}: no such preset or file; there are {there}")


def _preset(cls: type, name: str | None) -> dict:
    """The values a preset file gives the fields of `cls`. Every key must belong to some command."""
    if not name:
        return {}
    path = find_preset(name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    tables = {c.table for c in COMMANDS}
    common, own = {}, {}
    for key, value in document.items():
        if key in tables and isinstance(value, dict):
            owners = [c for c in COMMANDS if c.table == key]
            for name, inner in value.items():
                own |= _take(cls, owners, name, inner, f"{path}: [{key}] {name}")
        else:
            common |= _take(cls, COMMANDS, key, value, f"{path}: {key}")
    return common | own  # a table's key is nearer


def _take(cls: type, owners, key: str, value, where: str) -> dict:
    """{key: value} if it is a setting of `cls`, {} if only others of `owners` have it."""
    fields = {c: c.__dataclass_fields__[key] for c in owners if key in c.__dataclass_fields__}
    if not any("help" in field.metadata for field in fields.values()):
        names = {name for c in owners for name, field in c.__dataclass_fields__.items() if "help" in field.metadata}
        like = difflib.get_close_matches(key, names, 1)
        raise UserError(f"{where}: unknown setting" + (f"; did you mean {like[0]}?" if like else ""))
    if cls not in fields:
        return {}
    try:
        return {key: _read(value, fields[cls], typing.get_type_hints(cls)[key])}
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where} = {error}") from None
