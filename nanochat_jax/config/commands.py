"""The settings of the commands other than the training stages and scripts.doctor."""

from dataclasses import dataclass
from typing import ClassVar

from nanochat_jax.config.setting import Settings, setting
from nanochat_jax.config.training import (
    COMPUTE_DTYPE_HELP,
    CORE_DIR_HELP,
    DATA_DIR_HELP,
    DEVICE_TYPE_HELP,
    DEVICES,
    DTYPES,
    MAX_SEED,
    STAGES,
    TASK_DATA_DIR_HELP,
    TASK_FILES,
    TASK_FILES_HELP,
    TOP_K_HELP,
)

REPORT = "reset: record the start time and the machine; generate: write the report"


@dataclass(frozen=True)
class TokTrain(Settings):
    """Train the tokenizer."""

    table: ClassVar[str] = "tok"
    preset: str = ""  # the name of the preset that --config gives; not a flag
    data: str = setting(
        "", "text source: fineweb-edu, climbmix or local (default: the text that was downloaded, else local)"
    )
    data_dir: str = setting("", DATA_DIR_HELP)
    num_files: int = setting(
        0, "training shards to read from a downloaded source (auto: as many as --max_chars needs; -1: all)",
        auto=True, low=-1,
    )  # fmt: skip
    max_chars: int = setting(10_000_000_000, "maximum characters to train on", low=1)
    doc_cap: int = setting(10_000, "maximum characters per document; longer documents are truncated", low=1)
    vocab_size: int = setting(65536, "size of the vocabulary: 256 bytes, 9 special tokens, and the merges", low=256 + 9)
    fresh: bool = setting(False, "train even if a tokenizer with these settings exists")


@dataclass(frozen=True)
class TokEval(Settings):
    """Compare the tokenizer with the tokenizers of GPT-2 and GPT-4."""

    table: ClassVar[str] = "tok"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: what the tokenizer was trained on)")
    data_dir: str = setting("", DATA_DIR_HELP)


@dataclass(frozen=True)
class Dataset(Settings):
    """Download or convert pretraining text."""

    table: ClassVar[str] = "dataset"
    data: str = setting("fineweb-edu", "text source: fineweb-edu, climbmix or local")
    data_dir: str = setting("", "folder of parquet, jsonl, json or txt files to convert; --data is then ignored")
    num_files: int = setting(-1, "training shards to download, not counting the validation shard (-1: all)")
    num_workers: int = setting(4, "number of parallel downloads")
    begin: bool = setting(
        False, "record how many shards are wanted, but download only the validation shard and the first training shard"
    )
    preset_path: str = ""  # the file of the preset, which also has the settings of the later stages; not a flag
    tasks: bool = setting(False, "afterwards, also download what the later stages and the evaluations read")
    verify: bool = setting(False, "check the hash of every shard, and download damaged shards again")
    tokenize: bool = setting(False, "tokenize all text in advance; training then makes the same batches with less work")


@dataclass(frozen=True)
class Load(Settings):
    """The settings of commands that load a trained model."""

    preset: str = ""  # the name of the preset that --config gives; not a flag
    source: str = setting("sft", "stage of the model to load", choices=STAGES)
    model_tag: str = setting(
        "", "name of the run to load (default: the preset's name, else the stage's most recently saved run)"
    )
    step: int = setting(-1, "step of the checkpoint to load (-1: the latest)", low=0)
    device_type: str = setting("", DEVICE_TYPE_HELP, choices=DEVICES)
    compute_dtype: str = setting("", COMPUTE_DTYPE_HELP, choices=DTYPES)


@dataclass(frozen=True)
class BaseLoss(Load):
    """Measure bits per byte on training and validation text, and print samples."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage of the model to load", choices=STAGES)
    device_batch_size: int = setting(32, "rows per device in a forward pass", low=1)
    split_tokens: int = setting(20 * 524288, "number of tokens to evaluate in each split (train and val)", low=1)
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: what the model was trained on)")
    data_dir: str = setting("", DATA_DIR_HELP)


@dataclass(frozen=True)
class BaseEval(Load):
    """Evaluate a model with the CORE metric."""

    table: ClassVar[str] = "eval"
    source: str = setting("base", "stage of the model to load", choices=STAGES)
    max_per_task: int = setting(-1, "maximum number of examples per task (-1: all)", low=1)
    device_batch_size: int = setting(32, "rows per device in a forward pass", low=1)
    core_dir: str = setting("", CORE_DIR_HELP)


@dataclass(frozen=True)
class ChatEval(Load):
    """Evaluate a model on chat tasks, which are multiple-choice questions or problems with free-form answers."""

    table: ClassVar[str] = "eval"
    source: str = setting("", "stage of the model to load (required)", choices=STAGES)
    task_name: str = setting("", "names of tasks, joined by | (default: the six tasks of ChatCORE)")
    split: str = setting("test", "split to evaluate on; use val to choose settings", choices=("train", "val", "test"))
    temperature: float = setting(0.0, "sampling temperature (0: greedy)", low=0)
    max_new_tokens: int = setting(512, "maximum tokens per answer", low=1)
    num_samples: int = setting(1, "answers per problem; a problem is solved if any answer is right (pass@k)", low=1)
    top_k: int = setting(50, TOP_K_HELP, low=0)
    batch_size: int = setting(8, "rows per device in a forward pass of a multiple-choice task", low=1)
    slots: int = setting(0, "answers generated at once on a device (auto: as many as fit in memory)", auto=True, low=1)
    max_problems: int = setting(-1, "maximum number of problems per task (-1: all)", low=1)
    seed: int = setting(42, "random seed for sampling", low=0, high=MAX_SEED)
    task_data_dir: str = setting("", TASK_DATA_DIR_HELP)
    task_files: str = setting("", TASK_FILES_HELP + " (default: as in training)", choices=TASK_FILES)


@dataclass(frozen=True)
class ChatCli(Load):
    """Talk to the model in the terminal."""

    table: ClassVar[str] = "chat"
    prompt: str | None = setting(None, "answer this prompt and exit; -: read it from stdin (default: chat)")
    temperature: float = setting(0.6, "sampling temperature (0: greedy)", low=0, high=2)
    top_k: int = setting(50, TOP_K_HELP, low=0, high=65536)
    max_new_tokens: int = setting(256, "maximum tokens per answer", low=1)
    seed: int = setting(42, "random seed for sampling", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class ChatWeb(Load):
    """Talk to the model in the browser."""

    table: ClassVar[str] = "chat"
    temperature: float = setting(0.8, "sampling temperature of requests that do not set it (0: greedy)", low=0, high=2)
    top_k: int = setting(50, "sample from the k most likely tokens (0: from all); a request may set k", low=0, high=200)
    max_new_tokens: int = setting(512, "maximum tokens per answer of requests that set no maximum", low=1, high=4096)
    port: int = setting(8000, "port to listen on (0: any free port)", low=0, high=65535)
    host: str = setting(
        "127.0.0.1", "address to listen on (0.0.0.0: other machines can connect, and the Host header is not checked)"
    )
    allowed_hosts: str = setting(
        "",
        "comma-separated names under which clients reach the server, for example through a proxy (*: any name; "
        "default: localhost and loopback addresses if --host is one of them and no key is needed, else any name)",
    )
    num_gpus: int = setting(
        1, "number of GPUs; each holds a copy of the model and generates --slots answers at once", low=1, high=1024
    )
    slots: int = setting(4, "number of answers that each GPU generates at once", low=1, high=1024)
    max_waiting: int = setting(
        64, "maximum number of answers that wait for a slot; further requests get status 429", low=0, high=100_000
    )
    timeout: float = setting(600.0, "seconds a request may take, including its wait for a slot (0: no limit)", low=0)
    keep_alive: float = setting(
        75.0, "seconds an idle connection stays open; must exceed a proxy's keep-alive time (nginx and AWS: 60)", low=0
    )
    api_key: str = setting("", "key that clients must send (default: $NANOCHAT_API_KEY; empty: no key is needed)")
    cors: str = setting("", "comma-separated origins of the websites that may use the API (*: all websites)")
    log_chats: bool = setting(False, "write prompts and answers to the log")


@dataclass(frozen=True)
class Report(Settings):
    """Write report.md, which says what was run, how long it took, and how good the result is."""

    table: ClassVar[str] = "report"
    preset: str = ""  # the name of the preset that --config gives; not a flag
    command: str = setting("", REPORT, choices=("reset", "generate"), positional=True)
    model_tag: str = setting(
        "",
        "name of the runs to report (default: the preset's name, else the most recently saved run and its relatives)",
    )
    output: str = setting("report.md", "where to write a copy of the report")
