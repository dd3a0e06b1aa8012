"""Defines one frozen dataclass of settings for each command. commandline.py fills in the fields.

This module does not import JAX, because importing JAX would delay `--help`.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message without a traceback, and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or the name of the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def base_dir() -> Path:
    """Returns the base folder, which holds all downloads and results. Creates the folder if needed.

    The base folder is $NANOCHAT_BASE_DIR if this variable is set, else ~/.cache/nanochat.
    """
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path} cannot be created ({error.strerror})"
        raise UserError(f"{reason}: set NANOCHAT_BASE_DIR to a writable folder") from None
    return path


# -----------------------------------------------------------------------------
# The model's shape


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the transformer. Instances are hashable, because jitted functions take them as static arguments."""

    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    vocab_size: int = 65536
    sequence_len: int = 2048
    norm_eps: float = 1.1920929e-07  # the machine epsilon of float32, which is torch's default for RMSNorm
    rope_theta: float = 10000.0
    softcap: float = 15.0
    # One letter per layer. S: a token attends to a quarter of the context. L: a token attends to the whole context. The
    # pattern repeats over the layers, except that the last layer is always L.
    window_pattern: str = "L"

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd {self.n_embd} / n_head {self.n_head}: the head size must be an even integer")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: must consist of the letters S and L, like SSSL")

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of each layer: how many earlier tokens a token attends to (0: all earlier tokens)."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return tuple(short if letter == "S" and short < self.sequence_len else 0 for letter in pattern)

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """The number of rows in the embedding and in the head: vocab_size, rounded up to a multiple of 64.

        Rounding up makes matmuls faster and all shards equal in size.
        """
        return -(-self.vocab_size // 64) * 64

    @property
    def num_params(self) -> int:
        """The number of weights, including the padding rows of the embedding and the head."""
        kv = self.n_kv_head * self.head_dim
        block = 2 * self.n_embd**2 + 2 * self.n_embd * kv + 8 * self.n_embd**2
        return 2 * self.padded_vocab * self.n_embd + self.n_layer * block

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token for a forward and a backward pass. Attention is counted as if there were no causal mask."""
        matmul = self.num_params - self.padded_vocab * self.n_embd  # the embedding is a lookup, not a matmul
        return 6 * matmul + 12 * self.n_embd * sum(window or self.sequence_len for window in self.windows)


# -----------------------------------------------------------------------------
# What a setting is


def setting(
    default: Any,
    help: str,
    *,
    auto: bool = False,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """Returns a dataclass field with a help text.

    A number must be at least `low` and at most `high`. If `choices` is not empty, a string must be one of them. The
    default is always accepted, because it may be a special value such as -1 or "".

    If `auto` is true, an integer setting also accepts the word `auto`, and stores it as 0. If `positional` is true, the
    setting is a positional argument of the command line instead of a flag.
    """
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    metadata = {"help": help, "auto": auto, "low": low, "high": high, "choices": choices, "positional": positional}
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
    low, high, choices, auto = (field.metadata[key] for key in ("low", "high", "choices", "auto"))
    number = isinstance(value, int | float)
    finite = number and -math.inf < value < math.inf  # also false for NaN
    accepted = (finite and low <= value <= high) if number else (not choices or value in choices)
    if accepted or value == field.default or (auto and value == 0):
        return
    if choices:
        allowed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    elif high < math.inf:
        allowed = f"from {low} to {high}"
    elif low > -math.inf:
        allowed = f"at least {low}" if finite else f"at least {low} and finite"
    else:
        allowed = "finite"
    if auto:
        allowed += ", or auto"
    elif number and not low <= field.default <= high:
        allowed += f", or {field.default}"
    given = value if field.metadata["positional"] else f"--{field.name}={value}"
    raise UserError(f"{given}: must be {allowed}")


# -----------------------------------------------------------------------------
# Settings, one dataclass per command

STAGES = ("base", "mid", "sft", "rl")
DEVICES = ("cpu", "gpu", "cuda", "tpu")  # cuda is an alias of gpu
DTYPES = ("bfloat16", "float32")
PACKINGS = ("split", "crop", "stream")

DEVICE_TYPE = "platform to run on (default: the best available)"
COMPUTE_DTYPE = "dtype of matmul operands (default: bfloat16 if it is fast on the device, else float32)"
MIXTURE = "rows of each task to train on, as name=rows,name=rows (0: all rows; a task with too few repeats them)"
VAL_MIXTURE = "rows of each task to validate on, as name=rows,name=rows (0: all rows; a task with too few repeats them)"
DATA_DIR = "folder of parquet, jsonl or txt files to read instead of the source named by --data"
TASK_DATA_DIR = "folder with the data of the tasks (default: downloaded from the Hugging Face hub)"
CORE_DIR = "folder with the data of CORE (default: eval_bundle in the base folder; downloaded if missing)"
TOP_K = "sample from the k most likely tokens (0: from all tokens)"
SAVE_EVERY = "steps between checkpoints (-1: only at the end, at a stop signal, and before evaluations that may fail)"
EVAL_EVERY = "steps between evaluations of the validation loss (-1: only at the end)"
EVAL_TOKENS = "tokens per evaluation of the validation loss"
SHARD = (
    "what is sharded over the data axis in addition to the batch; optimizer: the optimizer's state (ZeRO-1); "
    "full: the optimizer's state and the weights (FSDP)"
)
REMAT = (
    "activations that the backward pass recomputes to save memory; none: no activations; "
    "matmuls: all except the results of matmuls; full: all"
)
PACKING = (
    "how documents are packed into rows; split: best fit, and what does not fit goes into another row; "
    "crop: best fit, and what does not fit is cut off; stream: documents are joined end to end"
)
COORDINATOR = "host:port of process 0 in a multi-host run (detected automatically under Slurm and Kubernetes)"
AUTO_BATCH = "tokens per optimizer step (auto: enough for --target_examples_per_step conversations)"
REPORT = "reset: record the start time and the machine; generate: write the report"
INIT_LR_FRAC = "initial learning rates, as a fraction of the values of the --*_lr flags"
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class ModelFlags(Settings):
    """The shape of a model that is trained from scratch."""

    depth: int = setting(20, "number of layers; determines width, number of heads and training length", low=1)
    aspect_ratio: int = setting(64, "width = depth * aspect_ratio, rounded up to a multiple of head_dim", low=1)
    head_dim: int = setting(128, "size of an attention head; must be even", low=2)
    n_kv_head: int = setting(
        0, "number of key/value heads (auto: one per query head; fewer: grouped-query attention)", auto=True, low=1
    )
    max_seq_len: int = setting(2048, "context length in tokens", low=2)
    window_pattern: str = setting(
        "L", "attention windows, as a pattern that repeats over the layers; S: a quarter of the context; L: all of it"
    )

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """Returns the shape of the model. Raises UserError if the shape is not valid."""
        if self.head_dim % 2:
            raise UserError(f"--head_dim={self.head_dim}: must be even: try {self.head_dim + 1}")
        # With the defaults, an odd depth needs rounding: depth * 64 is then not a multiple of 128.
        width = -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim
        heads = width // self.head_dim
        kv_heads = self.n_kv_head or heads
        if heads % kv_heads:
            raise UserError(f"--n_kv_head={kv_heads} does not divide the {heads} query heads of depth {self.depth}")
        return GPTConfig(
            self.depth, heads, kv_heads, width, vocab_size, self.max_seq_len, window_pattern=self.window_pattern.upper()
        )


@dataclass(frozen=True)
class Train(Settings):
    """The settings that all training stages share."""

    preset: str = ""  # the name of the preset that --config gives; not a flag
    run: str = setting("", "name of the wandb run (default: $WANDB_RUN; empty or 'dummy': wandb is off)")
    model_tag: str = setting(
        "", "name of the run and its folder (default: the preset's, else d<depth> for base, else the parent's)"
    )
    resume: str = setting(
        "auto", "auto: resume from the last undamaged checkpoint; never: move the old run aside; N: resume from step N"
    )
    seed: int = setting(42, "random seed for initialization, data order and sampling", low=0, high=MAX_SEED)
    device_type: str = setting("", DEVICE_TYPE, choices=DEVICES)
    compute_dtype: str = setting("", COMPUTE_DTYPE, choices=DTYPES)
    num_iterations: int = setting(-1, "number of optimizer steps (-1: derived from other settings)", low=1)
    device_batch_size: int = setting(
        0, "rows per device in a micro-batch; use fewer if memory runs out", auto=True, low=1
    )
    mesh: str = setting("", "number of devices on each mesh axis, such as node=2,data=8,model=1 (default: all on data)")
    shard: str = setting("optimizer", SHARD, choices=("optimizer", "full"))
    attention: str = setting("", "attention kernel (default: cudnn where it works, else xla)", choices=("cudnn", "xla"))
    remat: str = setting("none", REMAT, choices=("none", "matmuls", "full"))
    coordinator: str = setting("", COORDINATOR)
    num_processes: int = setting(0, "number of processes, if --coordinator is given")
    process_id: int = setting(-1, "index of this process, counted from 0, if --coordinator is given")
    scan_layers: bool = setting(False, "compile a single block for all layers; training starts sooner but runs slower")
    embedding_lr: float = setting(0.2, "embedding's learning rate (AdamW) at width 768; scales as width^-0.5", low=0)
    unembedding_lr: float = setting(0.004, "head's learning rate (AdamW) at width 768; scales as width^-0.5", low=0)
    matrix_lr: float = setting(0.02, "learning rate of the transformer's matrices (Muon)", low=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of the weights that AdamW updates", low=0)
    grad_clip: float = setting(0.0, "maximum norm of the gradient; larger gradients are scaled down (0: off)", low=0)
    save_every: int = setting(-1, SAVE_EVERY)
    keep_last: int = setting(2, "number of most recent checkpoints to keep", low=1)
    keep_every: int = setting(-1, "also keep each checkpoint whose step is a multiple of this number (-1: off)")

    table: ClassVar[str]

    @property
    def stage(self) -> str:
        """The name of the stage: base, mid, sft or rl."""
        return self.table


@dataclass(frozen=True)
class Base(ModelFlags, Train):
    """Pretraining on documents."""

    table: ClassVar[str] = "base"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: what the tokenizer was trained on)")
    data_dir: str = setting("", DATA_DIR)
    packing: str = setting("split", PACKING, choices=PACKINGS)
    total_batch_size: int = setting(524288, "tokens per optimizer step", low=1)
    target_flops: float = setting(-1.0, "total training FLOPs, from which the number of steps is computed (-1: off)")
    target_param_data_ratio: float = setting(
        20.0, "training tokens per parameter (ignored if --num_iterations or --target_flops is given)"
    )
    warmup_ratio: float = setting(0.0, "fraction of the steps during which the learning rate warms up", low=0, high=1)
    warmdown_ratio: float = setting(0.2, "fraction of the steps during which the learning rate decays", low=0, high=1)
    final_lr_frac: float = setting(0.0, "final learning rate, as a fraction of the peak learning rate", low=0)
    eval_every: int = setting(250, EVAL_EVERY)
    eval_tokens: int = setting(20 * 524288, EVAL_TOKENS)
    core_dir: str = setting("", CORE_DIR)
    core_metric_every: int = setting(2000, "steps between CORE evaluations (-1: never)")
    core_metric_max_per_task: int = setting(500, "maximum number of examples per task in a CORE evaluation")
    sample_every: int = setting(2000, "steps between printed samples of generated text (-1: never)")


@dataclass(frozen=True)
class Doctor(Base):
    """Describe this machine, check whether pretraining can run on it, and estimate how long pretraining would take."""


@dataclass(frozen=True)
class Mid(Train):
    """Midtraining on conversations and tasks in chat format, with loss on every token."""

    table: ClassVar[str] = "mid"
    source: str = setting("base", "stage of the model that training starts from", choices=STAGES)
    task_data_dir: str = setting("", TASK_DATA_DIR)
    mixture: dict[str, int] = setting(
        {"smoltalk": 0, "mmlu": 0, "gsm8k": 0, "identity": 2000, "simplespelling": 200000, "spellingbee": 80000},
        MIXTURE,
    )
    val_mixture: dict[str, int] = setting({"smoltalk": 0, "mmlu": 5200, "gsm8k": 420}, VAL_MIXTURE)
    total_batch_size: int = setting(524288, "tokens per optimizer step", low=1)
    init_lr_frac: float = setting(1.0, INIT_LR_FRAC, low=0)
    eval_every: int = setting(150, EVAL_EVERY)
    eval_tokens: int = setting(20 * 524288, EVAL_TOKENS)


@dataclass(frozen=True)
class Sft(Train):
    """Supervised finetuning on whole conversations, with loss only on the assistant's tokens."""

    table: ClassVar[str] = "sft"
    source: str = setting("mid", "stage of the model that training starts from", choices=STAGES)
    task_data_dir: str = setting("", TASK_DATA_DIR)
    mixture: dict[str, int] = setting(
        {"arc-easy": 0, "arc-challenge": 0, "gsm8k": 0, "smoltalk": 10000, "identity": 1000, "simplespelling": 300,
         "spellingbee": 300},
        MIXTURE,
    )  # fmt: skip
    val_mixture: dict[str, int] = setting({"smoltalk": 0}, VAL_MIXTURE)
    total_batch_size: int = setting(0, AUTO_BATCH, auto=True, low=1)
    target_examples_per_step: int = setting(
        32, "average number of conversations per optimizer step, if --total_batch_size is auto", low=1
    )
    num_epochs: int = setting(1, "passes over the mixture", low=1)
    init_lr_frac: float = setting(0.02, INIT_LR_FRAC, low=0)
    eval_every: int = setting(100, EVAL_EVERY)
    eval_tokens: int = setting(20 * 524288, EVAL_TOKENS)
    eval_metrics_every: int = setting(200, "steps between evaluations on --eval_metrics_tasks (-1: never)")
    eval_metrics_tasks: str = setting("mmlu|arc-easy", "names of the tasks to evaluate during training, joined by |")
    eval_metrics_max_problems: int = setting(1024, "maximum number of problems per task in an evaluation")


@dataclass(frozen=True)
class Rl(Train):
    """Reinforcement learning on tasks whose answers can be checked."""

    table: ClassVar[str] = "rl"
    source: str = setting("sft", "stage of the model that training starts from", choices=STAGES)
    mixture: dict[str, int] = setting({"gsm8k": 0}, MIXTURE)
    task_data_dir: str = setting("", TASK_DATA_DIR)
    device_batch_size: int = setting(8, "rows per device in a micro-batch; use fewer if memory runs out", low=1)
    examples_per_step: int = setting(16, "number of problems to train on per step", low=1)
    num_samples: int = setting(
        16, "answers per problem; an answer's advantage is its reward minus the problem's mean reward", low=2
    )
    oversampling: int = setting(
        1, "answer this many problems for each problem to train on; problems with unequal rewards are preferred", low=1
    )
    max_new_tokens: int = setting(256, "maximum tokens per answer", low=1)
    temperature: float = setting(1.0, "sampling temperature (0: greedy)", low=0)
    top_k: int = setting(50, TOP_K, low=0)
    init_lr_frac: float = setting(0.05, INIT_LR_FRAC, low=0)
    num_epochs: int = setting(1, "passes over the problems", low=1)
    eval_every: int = setting(60, "steps between evaluations of pass@k (-1: never)")
    eval_examples: int = setting(400, "problems per evaluation of pass@k", low=1)
    eval_samples: int = setting(8, "answers per problem in an evaluation; also the largest k of pass@k", low=1)
    save_every: int = setting(60, SAVE_EVERY)


TRAINING = {cls.table: cls for cls in (Base, Mid, Sft, Rl)}
assert tuple(TRAINING) == STAGES, f"stages {STAGES}, settings for {tuple(TRAINING)}"


@dataclass(frozen=True)
class TokTrain(Settings):
    """Train the tokenizer."""

    table: ClassVar[str] = "tok"
    data: str = setting(
        "", "text source: fineweb-edu, climbmix or local (default: the current tokenizer's source, else local)"
    )
    data_dir: str = setting("", DATA_DIR)
    num_files: int = setting(
        8, "training shards to read from a downloaded source (-1: all that nanochat_jax.dataset was told to download)"
    )
    max_chars: int = setting(10_000_000_000, "maximum characters to train on", low=1)
    doc_cap: int = setting(10_000, "maximum characters per document; longer documents are truncated", low=1)
    vocab_size: int = setting(65536, "size of the vocabulary: 256 bytes, 9 special tokens, and the merges", low=256 + 9)
    fresh: bool = setting(False, "train even if a tokenizer with these settings exists")


@dataclass(frozen=True)
class TokEval(Settings):
    """Compare the tokenizer with the tokenizers of GPT-2 and GPT-4."""

    table: ClassVar[str] = "tok"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: what the tokenizer was trained on)")
    data_dir: str = setting("", DATA_DIR)


@dataclass(frozen=True)
class Dataset(Settings):
    """Download or convert pretraining text."""

    table: ClassVar[str] = "dataset"
    data: str = setting("fineweb-edu", "text source: fineweb-edu, climbmix or local")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to convert instead of downloading --data")
    num_files: int = setting(-1, "training shards to download, not counting the validation shard (-1: all)")
    num_workers: int = setting(4, "number of parallel downloads")
    verify: bool = setting(False, "check the hash of every shard, and download damaged shards again")
    tokenize: bool = setting(False, "tokenize all text in advance; training makes the same batches with less work")


@dataclass(frozen=True)
class Load(Settings):
    """The settings of commands that load a trained model."""

    source: str = setting("sft", "stage of the model to load", choices=STAGES)
    model_tag: str = setting("", "name of the run to load (default: the most recently saved run of the stage)")
    step: int = setting(-1, "step of the checkpoint to load (-1: the latest)")
    device_type: str = setting("", DEVICE_TYPE, choices=DEVICES)
    compute_dtype: str = setting("", COMPUTE_DTYPE, choices=DTYPES)


@dataclass(frozen=True)
class BaseLoss(Load):
    """Measure bits per byte on training and validation text, and print samples."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage of the model to load", choices=STAGES)
    device_batch_size: int = setting(32, "rows per device in a forward pass", low=1)
    split_tokens: int = setting(20 * 524288, "number of tokens to evaluate in each split (train and val)", low=1)
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: what the model was trained on)")
    data_dir: str = setting("", DATA_DIR)


@dataclass(frozen=True)
class BaseEval(Load):
    """Evaluate a model with the CORE metric."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage of the model to load", choices=STAGES)
    max_per_task: int = setting(-1, "maximum number of examples per task (-1: all)")
    device_batch_size: int = setting(32, "rows per device in a forward pass", low=1)
    core_dir: str = setting("", CORE_DIR)


@dataclass(frozen=True)
class ChatEval(Load):
    """Evaluate a model on chat tasks, which are multiple-choice questions or problems with free-form answers."""

    table: ClassVar[str] = "eval"
    source: str = setting("", "stage of the model to load (required)", choices=STAGES)
    task_name: str = setting("", "names of tasks, joined by | (default: the six tasks of ChatCORE)")
    split: str = setting("test", "split to evaluate on; to choose settings, use val", choices=("train", "val", "test"))
    temperature: float = setting(0.0, "sampling temperature (0: greedy)", low=0)
    max_new_tokens: int = setting(512, "maximum tokens per answer", low=1)
    num_samples: int = setting(1, "answers per problem; a problem is solved if any answer is right (pass@k)", low=1)
    top_k: int = setting(50, TOP_K, low=0)
    batch_size: int = setting(8, "rows per device in a forward pass of a multiple-choice task", low=1)
    slots: int = setting(0, "answers generated at once on a device (auto: as many as fit in memory)", auto=True, low=1)
    max_problems: int = setting(-1, "maximum number of problems per task (-1: all)")
    seed: int = setting(42, "random seed for sampling")
    task_data_dir: str = setting("", TASK_DATA_DIR)


@dataclass(frozen=True)
class ChatCli(Load):
    """Talk to the model in the terminal."""

    table: ClassVar[str] = "chat"
    prompt: str = setting("", "answer this prompt and exit (default: chat interactively)")
    temperature: float = setting(0.6, "sampling temperature (0: greedy)", low=0)
    top_k: int = setting(50, TOP_K, low=0)
    max_new_tokens: int = setting(256, "maximum tokens per answer", low=1)
    seed: int = setting(42, "random seed for sampling")


@dataclass(frozen=True)
class ChatWeb(Load):
    """Talk to the model in the browser."""

    table: ClassVar[str] = "chat"
    temperature: float = setting(0.8, "sampling temperature of requests that do not set it (0: greedy)", low=0, high=2)
    top_k: int = setting(50, "sample from the k most likely tokens (0: from all); a request may set k", low=0, high=200)
    max_new_tokens: int = setting(512, "maximum tokens per answer; a request may ask for fewer", low=1, high=4096)
    port: int = setting(8000, "port to listen on (0: any free port)", low=0, high=65535)
    host: str = setting("127.0.0.1", "address to listen on (0.0.0.0: other machines can connect)")
    num_gpus: int = setting(1, "number of GPUs; each holds a copy of the model and has --slots slots", low=1, high=1024)
    slots: int = setting(4, "number of answers that each GPU generates at once", low=1, high=1024)
    max_waiting: int = setting(
        64, "maximum number of requests that wait for a slot; further requests get status 429", low=0, high=100_000
    )
    timeout: float = setting(600.0, "seconds a request may take, including its wait for a slot (0: no limit)", low=0)
    api_key: str = setting("", "key that clients must send (default: $NANOCHAT_API_KEY; empty: no key is needed)")
    cors: str = setting("", "comma-separated origins of the websites that may use the API (*: all websites)")
    log_chats: bool = setting(False, "write prompts and answers to the log")


@dataclass(frozen=True)
class Report(Settings):
    """Write report.md, which says what was run, how long it took, and how good the result is."""

    command: str = setting("", REPORT, choices=("reset", "generate"), positional=True)
    model_tag: str = setting("", "name of the runs to report (default: the most recently saved run of each stage)")
    output: str = setting("report.md", "where to write a copy of the report")
