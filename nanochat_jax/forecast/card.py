"""The GPUs for which programs can be compiled without having them: their peaks, and what XLA needs to know."""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from nanochat_jax.config import UserError, first_line, user_path
from nanochat_jax.config.setting import did_you_mean

CARDS = Path(__file__).with_name("cards")
MOST = 64  # GPUs of a target
EXAMPLE = "--target=h100:8"


@dataclass(frozen=True)
class Reachable:
    """The shares of a card's peaks that good kernels reach."""

    matmuls: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Card:
    """A kind of GPU. The fields are those of the files in `cards/`; bandwidths count one direction."""

    name: str  # as JAX calls the device
    gpus_per_node: int
    bf16_tflops: float
    fp8_tflops: float  # 0: the card has no matmuls in fp8
    memory_gb_per_s: float
    link_gb_per_s: float  # of one GPU, to the other GPUs of its node
    node_gb_per_s: float  # of one GPU, to other nodes
    reachable: Reachable
    xla: str  # a GpuTargetConfigProto, as text

    @property
    def memory(self) -> int:
        """The size of its memory in bytes."""
        return int(self.in_xla("device_memory_size"))

    @property
    def capability(self) -> str:
        """The CUDA compute capability, such as "9.0"."""
        version = re.search(r"cuda_compute_capability *\{([^}]*)\}", self.xla)
        numbers = dict(re.findall(r"(major|minor): *(\d+)", version[1] if version else ""))
        return f"{numbers['major']}.{numbers.get('minor', 0)}"

    @property
    def cudnn(self) -> int:
        """The version of cuDNN, such as 92801 for 9.28.1."""
        major, minor, patch = map(int, self.in_xla("dnn_version").strip('"').split("."))
        return major * 10_000 + minor * 100 + patch

    def in_xla(self, field: str) -> str:
        found = re.search(rf"\b{field}: *(\S+)", self.xla)
        if not found:
            raise KeyError(field)
        return found[1]


@dataclass(frozen=True)
class Target:
    """One or more GPUs of one kind, in one or more nodes."""

    card: Card
    count: int

    @property
    def nodes(self) -> int:
        return max(1, self.count // self.card.gpus_per_node)

    def __str__(self) -> str:
        nodes = f", {self.nodes} nodes of {self.card.gpus_per_node}" if self.nodes > 1 else ""
        return f"{self.count} x {self.card.name}{nodes}"


def known() -> list[str]:
    return sorted(path.stem for path in CARDS.glob("*.toml"))


def parse(text: str) -> Target:
    """Returns the target that the value of --target describes: a card or a file of figures, and a number of GPUs.

    Raises UserError if there is no such target, or if its file has a mistake.
    """
    name, _, number = text.rpartition(":") if re.search(r":\w*$", text) else (text, "", "1")
    path = user_path(name) if name.endswith(".toml") else CARDS / f"{name}.toml"
    if not name.endswith(".toml") and name not in known():
        raise UserError(
            f"--target={text}: unknown GPU {name!r}: choose from {', '.join(known())}, as in {EXAMPLE}, or give a file "
            f"of figures (.toml){did_you_mean(name, known())}"
        )
    if not number.isdigit() or not 1 <= int(number) <= MOST:
        raise UserError(f"--target={text}: {number!r} is not a number of GPUs from 1 to {MOST}: try --target={name}:8")
    card, count = read(path), int(number)
    if count > card.gpus_per_node and count % card.gpus_per_node:
        whole = count // card.gpus_per_node * card.gpus_per_node
        raise UserError(
            f"--target={text}: nodes have {card.gpus_per_node} GPUs, so {count} do not fill whole nodes: "
            f"try --target={name}:{whole}"
        )
    return Target(card, count)


def read(path: Path) -> Card:
    """Reads a card's peaks from a file NAME.toml, and what XLA needs from NAME.txtpb beside it.

    Raises UserError if a file is missing, or if a figure is missing, unknown or not a positive number.
    """
    try:
        given, xla = tomllib.loads(path.read_text()), path.with_suffix(".txtpb").read_text()
    except OSError as error:
        raise UserError(f"--target: {error.filename}: {error.strerror}: cards/ of this package has examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--target: {path}: not TOML: {first_line(error)}") from None
    shares = given.pop("reachable", None)
    if not isinstance(shares, dict):
        raise UserError(f"--target: {path}: the table [reachable] is missing: copy it from cards/h100.toml")
    _check_keys(path, given, {field.name for field in fields(Card)} - {"reachable", "xla"}, "")
    _check_keys(path, shares, {field.name for field in fields(Reachable)}, "reachable.")
    for key, value in [*given.items(), *((f"reachable.{key}", value) for key, value in shares.items())]:
        low, high = 0.0 if key == "fp8_tflops" else 1e-9, 1.0 if key.startswith("reachable.") else 1e9
        if key == "name":
            valid, expected = isinstance(value, str) and bool(value), "a text"
        elif key == "gpus_per_node":
            valid, expected = type(value) is int and 1 <= value <= MOST, f"a whole number from 1 to {MOST}"
        else:
            valid = type(value) in (int, float) and low <= value <= high
            expected = "a share from 0 to 1" if high == 1 else "a positive number"
        if not valid:
            raise UserError(f"--target: {path}: {key} = {value!r} must be {expected}")
    card = Card(**given, reachable=Reachable(**shares), xla=xla)
    try:
        _ = card.memory, card.capability, card.cudnn
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--target: {path.with_suffix('.txtpb')}: {first_line(error)} is missing or not a number: "
            "compare it with cards/h100.txtpb"
        ) from None
    return card


def _check_keys(path: Path, given: dict, wanted: set[str], prefix: str) -> None:
    """Raises UserError unless `given` has exactly the wanted keys."""
    for key in sorted(wanted - given.keys()):
        raise UserError(f"--target: {path}: {prefix}{key} is missing: cards/h100.toml of this package has all figures")
    for key in sorted(given.keys() - wanted):
        raise UserError(f"--target: {path}: unknown figure {prefix}{key}{did_you_mean(key, sorted(wanted))}")
