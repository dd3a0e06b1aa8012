"""All settings, as one frozen dataclass a command, and the way from the command line to one of them.

Dataclass defaults < preset file (`--config cpu` or a path) < command line. A preset holds common keys at its top and
the tables [tok] [base] [mid] [sft] [rl] [eval] [chat]; a key that no command knows is an error. Flags may be written
with dashes or underscores, the last of a repeated flag wins, and a lone `--` is ignored. Nothing here imports JAX, so
that `--help` and every complaint about a flag are immediate.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """Something the user can mend. Scripts print it as one line, without a traceback, and exit with 2."""


def base_dir() -> Path:
    """$NANOCHAT_BASE_DIR (default ~/.cache/nanochat), created: everything the project writes lies below it."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


# -----------------------------------------------------------------------------
# The model's shape


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the transformer; hashable, so that it can be a static argument of a jitted function."""

    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    vocab_size: int = 65536
    sequence_len: int = 2048
    norm_eps: float = 1.1920929e-07  # torch's default for RMSNorm, the float32 machine epsilon
    rope_theta: float = 10000.0
    softcap: float = 15.0

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd {self.n_embd} over {self.n_head} heads: the head size must be an even integer")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the head: a multiple of 64, for fast matmuls and even shards."""
        return -(-self.vocab_size // 64) * 64

    @property
    def num_params(self) -> int:
        kv = self.n_kv_head * self.head_dim
        block = 2 * self.n_embd**2 + 2 * self.n_embd * kv + 8 * self.n_embd**2
        return 2 * self.padded_vocab * self.n_embd + self.n_layer * block

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs a token, forward and backward; attention counted over the full square, as the field does."""
        matmul = self.num_params - self.padded_vocab * self.n_embd  # the embedding is gathered, not multiplied
        return 6 * matmul + 12 * self.n_layer * self.n_embd * self.sequence_len


# -----------------------------------------------------------------------------
# Settings, one dataclass a command


MIXTURE = "rows of each task, as name=rows,name=rows (0: all of them; more than there are: repeated)"


def setting(default, help: str):
    """A field with its line of `--help`. Integers whose help begins with "auto" also accept the word, stored as 0."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help})


@dataclass(frozen=True)
class Model:
    """The model's shape, wherever it can be given."""

    depth: int = setting(20, "layers; the one dial: width, heads and horizon follow from it")
    aspect_ratio: int = setting(64, "width = depth * aspect_ratio, rounded up to a multiple of head_dim")
    head_dim: int = setting(128, "size of an attention head")
    n_kv_head: int = setting(0, "auto: key/value heads, as many as query heads unless given (GQA)")
    max_seq_len: int = setting(2048, "context length in tokens")

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The shape that depth implies. UserError for dimensions that cannot work."""
        for name in ("depth", "aspect_ratio", "head_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        width = -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim  # up, so that odd depths work
        heads = width // self.head_dim
        kv_heads = self.n_kv_head or heads
        if heads % kv_heads:
            raise UserError(f"--n_kv_head={kv_heads} does not divide the {heads} query heads of depth {self.depth}")
        return GPTConfig(self.depth, heads, kv_heads, width, vocab_size, self.max_seq_len)


@dataclass(frozen=True)
class Train:
    """What all training stages share."""

    preset: str = ""  # name of the preset, the default tag of its runs; not a flag
    run: str = setting("", "name of the wandb run (default $WANDB_RUN; empty or 'dummy': no wandb)")
    model_tag: str = setting("", "folder of the run (default: the preset's name, else d<depth>)")
    resume: str = setting("auto", "auto: go on from the last good checkpoint; never: move the old run aside; or a step")
    seed: int = setting(42, "seed of initialisation, data order and sampling")
    device_type: str = setting("", "cpu, gpu or tpu (default: the best there is)")
    compute_dtype: str = setting("", "bfloat16 or float32 (default: bfloat16 on GPUs that have it, float32 elsewhere)")
    num_iterations: int = setting(-1, "optimizer steps (-1: derived)")
    device_batch_size: int = setting(0, "auto: rows a device takes at once; lower it when memory runs out")
    embedding_lr: float = setting(0.2, "learning rate of the embedding (AdamW), times (width/768)^-0.5")
    unembedding_lr: float = setting(0.004, "learning rate of the head (AdamW), times (width/768)^-0.5")
    matrix_lr: float = setting(0.02, "learning rate of the transformer's matrices (Muon)")
    weight_decay: float = setting(0.0, "decoupled weight decay of the AdamW groups")
    grad_clip: float = setting(0.0, "clip the global gradient norm (0: off)")
    save_every: int = setting(-1, "steps between checkpoints (-1: only at the end)")
    keep_last: int = setting(2, "checkpoints to keep")
    keep_every: int = setting(-1, "keep those of steps that are multiples of this as well, for good (-1: none)")

    table: ClassVar[str]

    @property
    def stage(self) -> str:
        return self.table


@dataclass(frozen=True)
class Base(Model, Train):
    """Pretraining on documents."""

    table: ClassVar[str] = "base"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: the tokenizer's)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")
    packing: str = setting("split", "how rows are made of documents: split (loses nothing), crop or stream")
    total_batch_size: int = setting(524288, "tokens an optimizer step")
    target_flops: float = setting(-1.0, "train for this many FLOPs (-1: off)")
    target_param_data_ratio: float = setting(20.0, "train on this many tokens a parameter (the horizon's default)")
    warmup_ratio: float = setting(0.0, "share of the run in which the learning rate rises")
    warmdown_ratio: float = setting(0.2, "share of the run in which the learning rate falls")
    final_lr_frac: float = setting(0.0, "last learning rate as a fraction of the first")
    eval_every: int = setting(250, "steps between evaluations of the validation loss (-1: only at the end)")
    eval_tokens: int = setting(20 * 524288, "tokens of one validation")
    core_dir: str = setting("", "folder of the CORE bundle (default: eval_bundle in the base folder, else the hub)")
    core_metric_every: int = setting(2000, "steps between CORE evaluations (-1: never)")
    core_metric_max_per_task: int = setting(500, "examples a CORE task, in training")
    sample_every: int = setting(2000, "steps between samples (-1: never)")


@dataclass(frozen=True)
class Mid(Train):
    """Midtraining: conversations and tasks in the format of chat, loss on every token."""

    table: ClassVar[str] = "mid"
    source: str = setting("base", "stage whose weights to start from")
    task_data_dir: str = setting("", "folder with task data, used instead of the hub")
    mixture: dict[str, int] = setting(
        {"smoltalk": 0, "mmlu": 0, "gsm8k": 0, "identity": 2000, "simplespelling": 200000, "spellingbee": 80000},
        MIXTURE,
    )
    val_mixture: dict[str, int] = setting({"smoltalk": 0, "mmlu": 5200, "gsm8k": 420}, "the same for validation")
    total_batch_size: int = setting(524288, "tokens an optimizer step")
    init_lr_frac: float = setting(1.0, "start all learning rates at this fraction")
    eval_every: int = setting(150, "steps between evaluations of the validation loss (-1: only at the end)")
    eval_tokens: int = setting(20 * 524288, "tokens of one validation")


@dataclass(frozen=True)
class Sft(Train):
    """Supervised finetuning: whole conversations, loss on what the assistant says."""

    table: ClassVar[str] = "sft"
    source: str = setting("mid", "stage whose weights to start from")
    task_data_dir: str = setting("", "folder with task data, used instead of the hub")
    mixture: dict[str, int] = setting(
        {"arc-easy": 0, "arc-challenge": 0, "gsm8k": 0, "smoltalk": 10000, "identity": 1000, "simplespelling": 300,
         "spellingbee": 300},
        MIXTURE,
    )  # fmt: skip
    val_mixture: dict[str, int] = setting({"smoltalk": 0}, "the same for validation")
    total_batch_size: int = setting(0, "auto: tokens an optimizer step, whole rows for target_examples_per_step")
    target_examples_per_step: int = setting(32, "conversations an optimizer step, on average")
    num_epochs: int = setting(1, "passes over the mixture")
    init_lr_frac: float = setting(0.02, "start all learning rates at this fraction")
    eval_every: int = setting(100, "steps between evaluations of the validation loss (-1: only at the end)")
    eval_tokens: int = setting(20 * 524288, "tokens of one validation")
    eval_metrics_every: int = setting(200, "steps between evaluations of the tasks below (-1: never)")
    eval_metrics_tasks: str = setting("mmlu|arc-easy", "tasks of that evaluation, joined by |")
    eval_metrics_max_problems: int = setting(1024, "problems a task in that evaluation")


@dataclass(frozen=True)
class Rl(Train):
    """Reinforcement learning on a task with a checkable answer."""

    table: ClassVar[str] = "rl"
    source: str = setting("sft", "stage whose weights to start from")
    task: str = setting("gsm8k", "tasks to train on, in turn, joined by |")
    task_data_dir: str = setting("", "folder with task data, used instead of the hub")
    device_batch_size: int = setting(8, "rows a device takes at once; lower it when memory runs out")
    examples_per_step: int = setting(16, "problems a step")
    num_samples: int = setting(16, "answers a problem")
    max_new_tokens: int = setting(256, "longest answer in tokens")
    temperature: float = setting(1.0, "sampling temperature")
    top_k: int = setting(50, "sample among the k likeliest tokens (0: all)")
    init_lr_frac: float = setting(0.05, "start all learning rates at this fraction")
    num_epochs: int = setting(1, "passes over the task")
    eval_every: int = setting(60, "steps between evaluations of pass@k (-1: never)")
    eval_examples: int = setting(400, "problems of that evaluation")
    eval_samples: int = setting(8, "answers a problem in that evaluation")
    save_every: int = setting(60, "steps between checkpoints (-1: only at the end)")


TRAINING = {cls.table: cls for cls in (Base, Mid, Sft, Rl)}
STAGES = tuple(TRAINING)


@dataclass(frozen=True)
class TokTrain:
    """Train the tokenizer."""

    table: ClassVar[str] = "tok"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: local)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")
    max_chars: int = setting(10_000_000_000, "characters to train on")
    doc_cap: int = setting(10_000, "characters a document contributes at most")
    vocab_size: int = setting(65536, "tokens, the nine special ones included")
    fresh: bool = setting(False, "train again even if this tokenizer exists")


@dataclass(frozen=True)
class TokEval:
    """Compare the tokenizer with GPT-2's and GPT-4's."""

    table: ClassVar[str] = "tok"
    data: str = setting("", "text source (default: the tokenizer's)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")


@dataclass(frozen=True)
class Dataset:
    """Get pretraining text."""

    table: ClassVar[str] = "dataset"
    data: str = setting("fineweb-edu", "text source: fineweb-edu, climbmix or local")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to convert")
    num_files: int = setting(-1, "training shards to download (-1: all); the validation shard always comes along")
    num_workers: int = setting(4, "parallel downloads")
    verify: bool = setting(False, "hash every shard again, and fetch the damaged ones anew")
    tokenize: bool = setting(False, "tokenize it all once, for training to read: the same batches, less work")


@dataclass(frozen=True)
class Load:
    """Which model to load, and where it runs."""

    source: str = setting("sft", "stage: base, mid, sft or rl")
    model_tag: str = setting("", "run to load (default: the most recently saved of that stage)")
    step: int = setting(-1, "checkpoint to load (-1: the latest)")
    device_type: str = setting("", "cpu, gpu or tpu (default: the best there is)")
    compute_dtype: str = setting("", "bfloat16 or float32 (default: bfloat16 on GPUs that have it, float32 elsewhere)")


@dataclass(frozen=True)
class BaseLoss(Load):
    """Bits per byte on training and validation text, and samples."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage: base, mid, sft or rl")
    device_batch_size: int = setting(32, "rows at once")
    split_tokens: int = setting(20 * 524288, "tokens of each split")
    data: str = setting("", "text source (default: the tokenizer's)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")


@dataclass(frozen=True)
class BaseEval(Load):
    """The CORE metric."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage: base, mid, sft or rl")
    max_per_task: int = setting(-1, "examples a task (-1: all)")
    device_batch_size: int = setting(32, "rows at once")
    core_dir: str = setting("", "folder of the CORE bundle (default: eval_bundle in the base folder, else the hub)")


@dataclass(frozen=True)
class ChatEval(Load):
    """Tasks: multiple choice and generative."""

    table: ClassVar[str] = "eval"
    source: str = setting("", "stage: mid, sft or rl (required)")
    task_name: str = setting("", "tasks joined by | (default: all six of ChatCORE)")
    split: str = setting("test", "test, or val: what settings may be chosen by")
    temperature: float = setting(0.0, "sampling temperature (0: greedy)")
    max_new_tokens: int = setting(512, "longest answer in tokens")
    num_samples: int = setting(1, "answers a problem; one right is a pass")
    top_k: int = setting(50, "sample among the k likeliest tokens (0: all)")
    batch_size: int = setting(8, "rows at once in categorical tasks")
    slots: int = setting(0, "auto: answers generated at once")
    max_problems: int = setting(-1, "problems a task (-1: all)")
    seed: int = setting(42, "seed of sampling")
    task_data_dir: str = setting("", "folder with task data, used instead of the hub")


@dataclass(frozen=True)
class ChatCli(Load):
    """Talk to the model in the terminal."""

    table: ClassVar[str] = "chat"
    prompt: str = setting("", "answer this and exit")
    temperature: float = setting(0.6, "sampling temperature (0: greedy)")
    top_k: int = setting(50, "sample among the k likeliest tokens (0: all)")
    max_new_tokens: int = setting(256, "longest answer in tokens")
    seed: int = setting(42, "seed of sampling")


@dataclass(frozen=True)
class ChatWeb(Load):
    """Talk to the model in the browser."""

    table: ClassVar[str] = "chat"
    temperature: float = setting(0.8, "default sampling temperature")
    top_k: int = setting(50, "default k of top-k sampling")
    max_new_tokens: int = setting(512, "default and longest answer in tokens")
    port: int = setting(8000, "port to listen on")
    host: str = setting("127.0.0.1", "address to listen on (0.0.0.0: everyone in the network can chat)")
    slots: int = setting(4, "answers generated at once")


COMMANDS = (TokTrain, TokEval, Dataset, Base, Mid, Sft, Rl, BaseLoss, BaseEval, ChatEval, ChatCli, ChatWeb)
SHORT = {
    "source": "i", "task_name": "a", "temperature": "t", "max_new_tokens": "m", "num_samples": "n", "top_k": "k",
    "batch_size": "b", "model_tag": "g", "step": "s", "max_problems": "x", "prompt": "p", "compute_dtype": "d",
    "num_files": "n", "num_workers": "w",
}  # fmt: skip

# -----------------------------------------------------------------------------
# From the command line to one of them

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
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="PRESET", help="preset: a name in configs/ or a path to a TOML file")
    types, defaults = typing.get_type_hints(cls), cls()
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        default = getattr(defaults, field.name)
        flags = [f"--{field.name}"]
        if field.name in SHORT and not (field.name == "num_samples" and cls is Rl):
            flags.insert(0, f"-{SHORT[field.name]}")
        text = field.metadata["help"]
        shown = "" if text.startswith("auto") or default in ("", {}) else f" [{_show(default)}]"
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
        return _convert(value, kind, auto=field.metadata["help"].startswith("auto"))
    except (ValueError, TypeError, LookupError, AttributeError):
        wanted = _WANTED.get(kind, "rows by name, like gsm8k=0,identity=30")
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
        value = dict(part.split("=") for part in value.split(",") if part)
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
        raise UserError(f"{where}: unknown setting")
    if cls not in fields:
        return {}
    try:
        return {key: _read(value, fields[cls], typing.get_type_hints(cls)[key])}
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where} = {error}") from None
