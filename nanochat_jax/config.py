"""All settings, as one frozen dataclass a command; commandline.py fills them. Nothing here imports JAX."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """Something the user can mend. Scripts print it as one line, without a traceback, and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def base_dir() -> Path:
    """$NANOCHAT_BASE_DIR (default ~/.cache/nanochat), created: everything the project writes lies below it."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path} cannot be made ({error.strerror})"
        raise UserError(f"{reason}: set NANOCHAT_BASE_DIR to a folder that can be written") from None
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
    window_pattern: str = "L"  # repeated over the layers; S: a quarter of the context, L and the last layer: all of it

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd {self.n_embd} over {self.n_head} heads: the head size must be an even integer")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: must be letters S and L, like SSSL")

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer how many earlier tokens a token sees, 0 for all of them."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return tuple(short if letter == "S" and short < self.sequence_len else 0 for letter in pattern)

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
        return 6 * matmul + 12 * self.n_embd * sum(window or self.sequence_len for window in self.windows)


# -----------------------------------------------------------------------------
# Settings, one dataclass a command


MIXTURE = "rows of each task, as name=rows,name=rows (0: all of them; more than there are: repeated)"


def setting(default, help: str, auto: bool = False):
    """A field with its line of `--help`. An integer that may be `auto` also accepts the word, stored as 0."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help, "auto": auto})


@dataclass(frozen=True)
class ModelFlags:
    """The model's shape, wherever it can be given."""

    depth: int = setting(20, "layers; the one dial: width, heads and horizon follow from it")
    aspect_ratio: int = setting(64, "width = depth * aspect_ratio, rounded up to a multiple of head_dim")
    head_dim: int = setting(128, "size of an attention head")
    n_kv_head: int = setting(0, "key/value heads, as many as query heads unless given (GQA)", auto=True)
    max_seq_len: int = setting(2048, "context length in tokens")
    window_pattern: str = setting("L", "attention windows, repeated over layers: S a quarter of the context, L all")

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The shape that depth implies. UserError for dimensions that cannot work."""
        for name, least in (("depth", 1), ("aspect_ratio", 1), ("head_dim", 1), ("max_seq_len", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        if self.head_dim % 2:
            raise UserError(f"--head_dim={self.head_dim}: must be even: try {self.head_dim + 1}")
        width = -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim  # up, so that odd depths work
        heads = width // self.head_dim
        kv_heads = self.n_kv_head or heads
        if heads % kv_heads:
            raise UserError(f"--n_kv_head={kv_heads} does not divide the {heads} query heads of depth {self.depth}")
        return GPTConfig(
            self.depth, heads, kv_heads, width, vocab_size, self.max_seq_len, window_pattern=self.window_pattern.upper()
        )


@dataclass(frozen=True)
class Train:
    """What all training stages share."""

    preset: str = ""  # name of the preset, the default tag of its runs; not a flag
    run: str = setting("", "name of the wandb run (default $WANDB_RUN; empty or 'dummy': no wandb)")
    model_tag: str = setting("", "folder of the run (default: the preset's name, else d<depth>)")
    resume: str = setting("auto", "auto: go on from the last good checkpoint; never: move the old run aside; or a step")
    seed: int = setting(42, "seed of initialisation, data order and sampling")
    device_type: str = setting("", "cpu, gpu or tpu (default: the best there is)")
    compute_dtype: str = setting("", "bfloat16 or float32 (default: the former where the device is fast with it)")
    num_iterations: int = setting(-1, "optimizer steps (-1: derived)")
    device_batch_size: int = setting(0, "rows a device takes at once; lower it when memory runs out", auto=True)
    mesh: str = setting("", "devices by axis, as node=2,data=8,model=1 (default: all on data)")
    shard: str = setting("optimizer", "what the data axis cuts besides the batch: optimizer (ZeRO-1) or full (FSDP)")
    attention: str = setting("", "cudnn or xla (default: cuDNN where it runs)")
    remat: str = setting("none", "recompute in the backward pass to save memory: none, matmuls (keep those) or full")
    coordinator: str = setting("", "host:port of process 0, of a run on several hosts (Slurm, Kubernetes: found alone)")
    num_processes: int = setting(0, "processes of that run")
    process_id: int = setting(-1, "which of them this is")
    scan_layers: bool = setting(False, "compile one block for all layers: starts sooner, runs slower")
    embedding_lr: float = setting(0.2, "learning rate of the embedding (AdamW), times (width/768)^-0.5")
    unembedding_lr: float = setting(0.004, "learning rate of the head (AdamW), times (width/768)^-0.5")
    matrix_lr: float = setting(0.02, "learning rate of the transformer's matrices (Muon)")
    weight_decay: float = setting(0.0, "decoupled weight decay of the AdamW groups")
    grad_clip: float = setting(0.0, "clip the global gradient norm (0: off)")
    save_every: int = setting(-1, "steps between checkpoints (-1: at the end, when stopped, before tasks are judged)")
    keep_last: int = setting(2, "checkpoints to keep")
    keep_every: int = setting(-1, "keep those of steps that are multiples of this as well, for good (-1: none)")

    table: ClassVar[str]

    @property
    def stage(self) -> str:
        return self.table


@dataclass(frozen=True)
class Base(ModelFlags, Train):
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
class Doctor(Base):
    """What this machine is and what would be trained on it."""


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
    total_batch_size: int = setting(0, "tokens an optimizer step, whole rows for target_examples_per_step", auto=True)
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
    mixture: dict[str, int] = setting({"gsm8k": 0}, MIXTURE)
    task_data_dir: str = setting("", "folder with task data, used instead of the hub")
    device_batch_size: int = setting(8, "rows a device takes at once; lower it when memory runs out")
    examples_per_step: int = setting(16, "problems a step trains on")
    num_samples: int = setting(16, "answers a problem")
    oversampling: int = setting(1, "try so many times the problems, to train on those whose answers differ in reward")
    max_new_tokens: int = setting(256, "longest answer in tokens")
    temperature: float = setting(1.0, "sampling temperature")
    top_k: int = setting(50, "sample among the k likeliest tokens (0: all)")
    init_lr_frac: float = setting(0.05, "start all learning rates at this fraction")
    num_epochs: int = setting(1, "passes over the task")
    eval_every: int = setting(60, "steps between evaluations of pass@k (-1: never)")
    eval_examples: int = setting(400, "problems of that evaluation")
    eval_samples: int = setting(8, "answers a problem in that evaluation")
    save_every: int = setting(60, "steps between checkpoints (-1: at the end, when stopped, before tasks are judged)")


TRAINING = {cls.table: cls for cls in (Base, Mid, Sft, Rl)}
STAGES = tuple(TRAINING)


@dataclass(frozen=True)
class TokTrain:
    """Train the tokenizer."""

    table: ClassVar[str] = "tok"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: local)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")
    num_files: int = setting(8, "training shards of a source on the hub, from the first (-1: all asked for)")
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
    compute_dtype: str = setting("", "bfloat16 or float32 (default: the former where the device is fast with it)")


@dataclass(frozen=True)
class BaseLoss(Load):
    """Bits per byte on training and validation text, and samples."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage: base, mid, sft or rl")
    device_batch_size: int = setting(32, "rows a device takes at once")
    split_tokens: int = setting(20 * 524288, "tokens of each split")
    data: str = setting("", "text source (default: that of the run)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")


@dataclass(frozen=True)
class BaseEval(Load):
    """The CORE metric."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage: base, mid, sft or rl")
    max_per_task: int = setting(-1, "examples a task (-1: all)")
    device_batch_size: int = setting(32, "rows a device takes at once")
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
    batch_size: int = setting(8, "rows a device takes at once in categorical tasks")
    slots: int = setting(0, "answers a device generates at once", auto=True)
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
    num_gpus: int = setting(1, "GPUs to use, each with a whole model and --slots of its own")
    slots: int = setting(4, "answers a GPU generates at once")
    max_waiting: int = setting(64, "answers that may wait for a slot; whoever comes then is told to try again")
    timeout: float = setting(600.0, "seconds a request may take, waiting included (0: as long as it takes)")
    api_key: str = setting("", "key that clients must send (default $NANOCHAT_API_KEY; empty: none is needed)")
    cors: str = setting("", "web sites that may use the API from a browser: their origins, joined by commas, or *")
    log_chats: bool = setting(False, "write prompts and answers to the log")
