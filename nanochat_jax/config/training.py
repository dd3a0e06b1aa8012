"""The settings of the training stages: base, mid, sft and rl."""

from dataclasses import dataclass
from typing import ClassVar

from nanochat_jax.config.gpt import GPTConfig
from nanochat_jax.config.setting import Settings, UserError, setting

STAGES = ("base", "mid", "sft", "rl")
DEVICES = ("cpu", "gpu", "cuda", "tpu")  # cuda is an alias of gpu
DTYPES = ("bfloat16", "float32")
PACKINGS = ("split", "crop", "stream")

DEVICE_TYPE_HELP = "platform to run on (default: the best available)"
COMPUTE_DTYPE_HELP = "dtype of matmul operands (default: bfloat16 if it is fast on the device, else float32)"
MIXTURE_HELP = (
    "rows of each task to train on, as name=rows,name=rows (0: all rows; if a task has too few, they are repeated); "
    "customjson:FILE=rows reads your own conversations"
)
VAL_MIXTURE_HELP = (
    "rows of each task to validate on, as name=rows,name=rows (0: all rows; if a task has too few, they are repeated)"
)
DATA_DIR_HELP = "folder of parquet, jsonl, json or txt files to read instead of the source named by --data"
TASK_DATA_DIR_HELP = "folder with the data of the tasks (default: downloaded from the Hugging Face hub)"
TASK_FILES_HELP = (
    "source of the words to spell and of the conversations about identity; "
    "published: downloads those of the original nanochat; "
    "generated: uses frequent words of the tokenizer's training text, and generates conversations"
)
TASK_ORDER_HELP = "order of the conversations; shuffled: all tasks mixed; sequence: one task after the other"
CORE_DIR_HELP = "folder with the data of CORE (default: eval_bundle in the base folder; downloaded if missing)"
TOP_K_HELP = "sample from the k most likely tokens (0: from all tokens)"
SAVE_EVERY_HELP = (
    "steps between checkpoints (-1: only at the end, at a stop signal, and before evaluations that may fail)"
)
EVAL_EVERY_HELP = "steps between evaluations of the validation loss (-1: only at the end)"
TASK_FILES = ("generated", "published")
TASK_ORDERS = ("shuffled", "sequence")
EVAL_TOKENS_HELP = "tokens per evaluation of the validation loss"
SHARD_HELP = (
    "what is sharded over the data axis in addition to the batch; optimizer: the optimizer's state (ZeRO-1); "
    "full: the optimizer's state and the weights (FSDP)"
)
REMAT_HELP = (
    "activations that the backward pass recomputes to save memory; none: no activations; "
    "matmuls: all except the results of matmuls; full: all"
)
PACKING_HELP = (
    "how documents are packed into rows; split: best fit, and what does not fit goes into another row; "
    "crop: best fit, and what does not fit is cut off; stream: documents are joined end to end"
)
MAX_EPOCHS_HELP = "maximum passes over the text; a longer run is refused, because repeated text teaches less and less"
MAX_EPOCHS_OF_MIXTURE_HELP = (
    "maximum passes over the mixture that --num_iterations may ask for; a longer run is refused"
)
COORDINATOR_HELP = "host:port of process 0 in a multi-host run (detected automatically under Slurm and Kubernetes)"
AUTO_BATCH_HELP = "tokens per optimizer step (auto: enough for --target_examples_per_step conversations)"
INIT_LR_FRAC_HELP = "initial learning rates, as a fraction of the values of the --*_lr flags"
SOURCE_HELP = "stage of the model that training starts from"
AS_PARENT = "; must agree with the model that training starts from"
MAX_SEED = 2**31 - 1
UNTIMED_STEPS = 10  # the first steps do not count toward the training time, as in the original nanochat


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
        # With the defaults, the width is rounded up if the depth is odd: depth * 64 is then not a multiple of 128.
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
        "",
        "name of the run and its folder (default: the preset's name, else d<depth> for base, else the parent's name)",
    )
    resume: str = setting(
        "auto", "auto: resume from the last undamaged checkpoint; never: move the old run aside; N: resume from step N"
    )
    dry_run: bool = setting(False, "print what the run would do, without training; may download or generate task data")
    seed: int = setting(42, "random seed for initialization, data order and sampling", low=0, high=MAX_SEED)
    device_type: str = setting("", DEVICE_TYPE_HELP, choices=DEVICES)
    compute_dtype: str = setting("", COMPUTE_DTYPE_HELP, choices=DTYPES)
    num_iterations: int = setting(-1, "number of optimizer steps (-1: computed from other settings)", low=1)
    device_batch_size: int = setting(
        0, "rows per replica in a micro-batch; use fewer if memory runs out", auto=True, low=1
    )
    mesh: str = setting("", "number of devices on each mesh axis, such as node=2,data=8,model=1 (default: all on data)")
    shard: str = setting("optimizer", SHARD_HELP, choices=("optimizer", "full"))
    attention: str = setting("", "attention kernel (default: cudnn on GPUs, else xla)", choices=("cudnn", "xla"))
    remat: str = setting("none", REMAT_HELP, choices=("none", "matmuls", "full"))
    coordinator: str = setting("", COORDINATOR_HELP)
    num_processes: int = setting(0, "number of processes, if --coordinator is given", low=1)
    process_id: int = setting(-1, "index of this process, counted from 0, if --coordinator is given", low=0)
    scan_layers: bool = setting(False, "compile a single block for all layers; training starts sooner but runs slower")
    embedding_lr: float = setting(0.2, "embedding's learning rate (AdamW) at width 768; scales as width^-0.5", low=0)
    unembedding_lr: float = setting(0.004, "head's learning rate (AdamW) at width 768; scales as width^-0.5", low=0)
    matrix_lr: float = setting(0.02, "learning rate of the transformer's matrices (Muon)", low=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of the weights that AdamW updates", low=0)
    grad_clip: float = setting(0.0, "maximum norm of the gradient; larger gradients are scaled down (0: off)", low=0)
    save_every: int = setting(-1, SAVE_EVERY_HELP, low=1)
    keep_last: int = setting(2, "number of most recent checkpoints to keep", low=1)
    keep_every: int = setting(-1, "also keep each checkpoint whose step is a multiple of this number (-1: off)", low=1)

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
    data_dir: str = setting("", DATA_DIR_HELP)
    max_epochs: float = setting(8.0, MAX_EPOCHS_HELP, low=0)
    packing: str = setting("split", PACKING_HELP, choices=PACKINGS)
    total_batch_size: int = setting(524288, "tokens per optimizer step", low=1)
    target_flops: float = setting(
        -1.0, "total training FLOPs, from which the number of steps is computed (-1: off)", low=1
    )
    target_param_data_ratio: float = setting(
        20.0,
        "training tokens per parameter (ignored if --num_iterations or --target_flops is given)",
        low=0,
    )
    warmup_ratio: float = setting(0.0, "fraction of the steps during which the learning rate warms up", low=0, high=1)
    warmdown_ratio: float = setting(0.2, "fraction of the steps during which the learning rate decays", low=0, high=1)
    final_lr_frac: float = setting(0.0, "final learning rate, as a fraction of the peak learning rate", low=0)
    eval_every: int = setting(250, EVAL_EVERY_HELP, low=1, special=-1)
    eval_tokens: int = setting(20 * 524288, EVAL_TOKENS_HELP, low=1)
    core_dir: str = setting("", CORE_DIR_HELP)
    core_metric_every: int = setting(2000, "steps between CORE evaluations (-1: never)", low=1, special=-1)
    core_metric_max_per_task: int = setting(
        500, "maximum number of examples per task in a CORE evaluation (-1: all)", low=1, special=-1
    )
    sample_every: int = setting(2000, "steps between printed samples of generated text (-1: never)", low=1, special=-1)


@dataclass(frozen=True)
class Doctor(Base):
    """Describe this machine, check whether pretraining can run on it, and estimate how long pretraining would take."""

    preset_path: str = ""  # the file of the preset, which also has the settings of the tokenizer; not a flag
    target: str = setting(
        "", "compile for GPUs that are not here, and print what a run on them would need and at best reach: "
        "a100, b200, h100, h200, rtx4090 or a file of figures, and their number, such as h100:8",
    )  # fmt: skip
    price_per_hour: float = setting(0.0, "with --target: what all its GPUs cost per hour, to print a price", low=0)
    json: str = setting("", "with --target: also write the result as JSON to this file (-: to standard output)")


@dataclass(frozen=True)
class LaterStage(Train):
    """The settings of the stages that start from a trained model, their parent.

    The parent determines the shape of the model. Flags for the shape are accepted only if they agree with the parent.
    """

    source: str = setting("", SOURCE_HELP, choices=STAGES)
    source_tag: str = setting(
        "",
        "name of the run that training starts from "
        "(default: --model_tag, else the preset's name, else the most recently saved run)",
    )
    source_step: int = setting(-1, "step of the checkpoint that training starts from (-1: the latest)", low=0)
    depth: int = setting(0, f"number of layers{AS_PARENT}", auto=True, low=1)
    aspect_ratio: int = setting(0, f"width per layer, as in --stage=base{AS_PARENT}", auto=True, low=1)
    head_dim: int = setting(0, f"size of an attention head{AS_PARENT}", auto=True, low=2)
    n_kv_head: int = setting(0, f"number of key/value heads{AS_PARENT}", auto=True, low=1)
    max_seq_len: int = setting(0, f"context length in tokens{AS_PARENT}", auto=True, low=2)
    window_pattern: str = setting("", f"attention windows, as in --stage=base{AS_PARENT}")

    def check_shape(self, model_cfg: GPTConfig) -> None:
        """Raises UserError if a flag for the shape does not agree with the parent's model."""
        # The width is computed as in `ModelFlags.gpt_config`.
        width = -(-model_cfg.n_layer * self.aspect_ratio // model_cfg.head_dim) * model_cfg.head_dim
        actual = {
            "depth": model_cfg.n_layer,
            "aspect_ratio": self.aspect_ratio if width == model_cfg.n_embd else f"width {model_cfg.n_embd}",
            "head_dim": model_cfg.head_dim,
            "n_kv_head": model_cfg.n_kv_head,
            "max_seq_len": model_cfg.sequence_len,
            "window_pattern": model_cfg.window_pattern,
        }
        for name, value in actual.items():
            given = getattr(self, name)
            if given and str(given).upper() != str(value).upper():
                raise UserError(
                    f"--{name}={given}: the model to start from has {value}: leave out --{name}, also in the preset"
                )


@dataclass(frozen=True)
class Mid(LaterStage):
    """Midtraining on conversations and tasks in chat format, with loss on every token."""

    table: ClassVar[str] = "mid"
    source: str = setting("base", SOURCE_HELP, choices=STAGES)
    task_data_dir: str = setting("", TASK_DATA_DIR_HELP)
    task_files: str = setting("generated", TASK_FILES_HELP, choices=TASK_FILES)
    mixture: dict[str, int] = setting(
        {"smoltalk": 0, "mmlu": 0, "gsm8k": 0, "identity": 2000, "simplespelling": 200000, "spellingbee": 80000},
        MIXTURE_HELP,
    )
    val_mixture: dict[str, int] = setting({"smoltalk": 0, "mmlu": 5200, "gsm8k": 420}, VAL_MIXTURE_HELP)
    task_order: str = setting("shuffled", TASK_ORDER_HELP, choices=TASK_ORDERS)
    max_epochs: float = setting(8.0, MAX_EPOCHS_OF_MIXTURE_HELP, low=0)
    total_batch_size: int = setting(524288, "tokens per optimizer step", low=1)
    init_lr_frac: float = setting(1.0, INIT_LR_FRAC_HELP, low=0)
    eval_every: int = setting(150, EVAL_EVERY_HELP, low=1, special=-1)
    eval_tokens: int = setting(20 * 524288, EVAL_TOKENS_HELP, low=1)


@dataclass(frozen=True)
class Sft(LaterStage):
    """Supervised finetuning on whole conversations, with loss only on the assistant's tokens."""

    table: ClassVar[str] = "sft"
    source: str = setting("mid", SOURCE_HELP, choices=STAGES)
    task_data_dir: str = setting("", TASK_DATA_DIR_HELP)
    task_files: str = setting("generated", TASK_FILES_HELP, choices=TASK_FILES)
    mixture: dict[str, int] = setting(
        {"arc-easy": 0, "arc-challenge": 0, "gsm8k": 0, "smoltalk": 10000, "identity": 1000, "simplespelling": 300,
         "spellingbee": 300},
        MIXTURE_HELP,
    )  # fmt: skip
    val_mixture: dict[str, int] = setting({"smoltalk": 0}, VAL_MIXTURE_HELP)
    task_order: str = setting("shuffled", TASK_ORDER_HELP, choices=TASK_ORDERS)
    max_epochs: float = setting(8.0, MAX_EPOCHS_OF_MIXTURE_HELP, low=0)
    total_batch_size: int = setting(0, AUTO_BATCH_HELP, auto=True, low=1)
    target_examples_per_step: int = setting(
        32, "average number of conversations per optimizer step, if --total_batch_size is auto", low=1
    )
    num_epochs: int = setting(1, "passes over the mixture (ignored if --num_iterations is given)", low=1)
    init_lr_frac: float = setting(0.02, INIT_LR_FRAC_HELP, low=0)
    eval_every: int = setting(100, EVAL_EVERY_HELP, low=1, special=-1)
    eval_examples: int = setting(3200, "conversations per evaluation of the validation loss", low=1)
    eval_metrics_every: int = setting(
        200, "steps between evaluations on --eval_metrics_tasks (-1: never)", low=1, special=-1
    )
    eval_metrics_tasks: str = setting("mmlu|arc-easy", "names of the tasks to evaluate during training, joined by |")
    eval_metrics_max_problems: int = setting(
        1024, "maximum number of problems per task in an evaluation (-1: all)", low=1, special=-1
    )


@dataclass(frozen=True)
class Rl(LaterStage):
    """Reinforcement learning on tasks whose answers can be checked."""

    table: ClassVar[str] = "rl"
    source: str = setting("sft", SOURCE_HELP, choices=STAGES)
    mixture: dict[str, int] = setting({"gsm8k": 0}, MIXTURE_HELP)
    task_data_dir: str = setting("", TASK_DATA_DIR_HELP)
    task_files: str = setting("generated", TASK_FILES_HELP, choices=TASK_FILES)
    device_batch_size: int = setting(8, "rows per replica in a micro-batch; use fewer if memory runs out", low=1)
    examples_per_step: int = setting(16, "number of problems to train on per step", low=1)
    num_samples: int = setting(
        16, "answers per problem; an answer's advantage is its reward minus the problem's mean reward", low=2
    )
    oversampling: int = setting(
        1, "problems to answer per problem to train on; problems whose answers get unequal rewards are preferred", low=1
    )
    max_new_tokens: int = setting(256, "maximum tokens per answer", low=1)
    temperature: float = setting(1.0, "sampling temperature (0: greedy)", low=0)
    top_k: int = setting(50, TOP_K_HELP, low=0)
    init_lr_frac: float = setting(0.05, INIT_LR_FRAC_HELP, low=0)
    num_epochs: int = setting(1, "passes over the problems (ignored if --num_iterations is given)", low=1)
    eval_every: int = setting(60, "steps between evaluations of pass@k (-1: never)", low=1, special=-1)
    eval_examples: int = setting(400, "problems per evaluation of pass@k", low=1)
    eval_samples: int = setting(8, "answers per problem in an evaluation; also the largest k of pass@k", low=1)
    save_every: int = setting(60, SAVE_EVERY_HELP, low=1, special=-1)


TRAINING = {cls.table: cls for cls in (Base, Mid, Sft, Rl)}
assert tuple(TRAINING) == STAGES, f"stages {STAGES}, settings for {tuple(TRAINING)}"
