"""Defines settings: dataclass fields with a help text and a range. Also defines UserError and the base folder."""

import dataclasses
import difflib
import errno
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message without a traceback, and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or the name of the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


AGAIN = "and run the same command again"
# What the user can do about errors of the operating system whose cause is outside this program.
ADVICE = {
    errno.ENOSPC: f"make room {AGAIN}", errno.EDQUOT: f"make room {AGAIN}",
    errno.EACCES: f"give this user access {AGAIN}", errno.EPERM: f"give this user access {AGAIN}",
    errno.EROFS: "this file system is read-only: set NANOCHAT_BASE_DIR to a writable folder",
    errno.EIO: f"check the disk {AGAIN}", errno.ESTALE: f"check the network file system {AGAIN}",
    errno.EMFILE: f"raise the limit with ulimit -n {AGAIN}", errno.ENFILE: f"close other programs {AGAIN}",
    errno.ENOENT: f"put it back {AGAIN}", errno.ENOTDIR: f"put the folder back {AGAIN}",
    errno.ELOOP: f"put it back {AGAIN}", errno.EFBIG: f"raise the limit with ulimit -f {AGAIN}",
}  # fmt: skip


def advice_for(error: OSError) -> str:
    """Returns what the user can do about `error`, or "" if it may be a bug of this program.

    A path that does not exist is a bug if the error does not name it, or if it lies in this package.
    """
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        if not isinstance(error.filename, str | bytes):
            return ""
        if PACKAGE in Path(os.path.abspath(os.fsdecode(error.filename))).parents:
            return ""
    return ADVICE.get(error.errno or 0, "")


def user_path(text: str | Path) -> Path:
    """Returns the path that a user wrote, with ~ expanded. Unlike Path.expanduser, accepts the ~ of an unknown user."""
    return Path(os.path.expanduser(text))


def base_dir() -> Path:
    """Returns the base folder, which holds all downloads and results. Creates the folder if needed.

    The base folder is $NANOCHAT_BASE_DIR if this variable is set, else ~/.cache/nanochat.
    """
    path = user_path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path} cannot be created ({error.strerror})"
        raise UserError(f"{reason}: set NANOCHAT_BASE_DIR to a writable folder") from None
    return path


def setting(
    default: Any,
    help: str,
    *,
    auto: bool = False,
    low: float = -math.inf,
    high: float = math.inf,
    special: float | None = None,
    choices: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """Returns a dataclass field with a help text.

    A number must be at least `low` and at most `high`. If `choices` is not empty, a string value must be one of the
    choices. The default is always accepted, because it may be a special value such as -1 or "". `special` is one
    more value that is always accepted.

    If `auto` is true, an integer setting also accepts the word `auto`, and stores it as 0. If `positional` is true, the
    setting is a positional argument of the command line instead of a flag.
    """
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    metadata = {
        "help": help, "auto": auto, "low": low, "high": high, "special": special, "choices": choices,
        "positional": positional,
    }  # fmt: skip
    return dataclasses.field(**factory, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The base class of all settings. The constructor raises UserError if the value of a field is not allowed."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "help" in field.metadata:
                _check(field, getattr(self, field.name))


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError if `field` does not allow `value`. No field allows infinity or NaN."""
    low, high, special, choices, auto = (field.metadata[key] for key in ("low", "high", "special", "choices", "auto"))
    number = isinstance(value, int | float)
    finite = number and -math.inf < value < math.inf  # also false for NaN
    accepted = (finite and low <= value <= high) if number else (not choices or value in choices)
    if accepted or value == field.default or (auto and value == 0) or (special is not None and value == special):
        return
    if choices:
        allowed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]])) + did_you_mean(value, choices)
    elif high < math.inf:
        allowed = f"from {low} to {high}"
    elif low > -math.inf:
        allowed = f"at least {low}" if finite else f"at least {low} and finite"
    else:
        allowed = "finite"
    if auto:
        allowed += ", or auto"
    elif special is not None:
        allowed += f", or {special}"
    elif number and not low <= field.default <= high:
        allowed += f", or {field.default}"
    given = value if field.metadata["positional"] else f"--{field.name}={value}"
    raise UserError(f"{given}: must be {allowed}")


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns "; did you mean NAME?" with the most similar name in `known`, or "" if none is similar.

    The similarity must be at least `cutoff`, which is from 0 (any name) to 1 (the same name).
    """
    similar = difflib.get_close_matches(word.lower(), list(known), 1, cutoff)
    return f"; did you mean {similar[0]}?" if similar else ""
