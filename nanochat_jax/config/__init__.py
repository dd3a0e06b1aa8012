"""The settings of every command: one frozen dataclass per command, filled in by commandline.py.

This room provides the settings, the shape of the model (GPTConfig) and UserError. It uses no other room. It does not
import JAX, because importing JAX would delay `--help`.

    setting.py    what a setting is: a default, a help text and a range
    gpt.py        the shape of the transformer
    training.py   the settings of the training stages
    commands.py   the settings of the other commands
"""

from nanochat_jax.config.commands import (
    BaseEval,
    BaseLoss,
    ChatCli,
    ChatEval,
    ChatWeb,
    Dataset,
    Load,
    Report,
    TokEval,
    TokTrain,
)
from nanochat_jax.config.gpt import GPTConfig
from nanochat_jax.config.setting import (
    REPOSITORY,
    Settings,
    UserError,
    advice_for,
    base_dir,
    did_you_mean,
    first_line,
    setting,
    user_path,
)
from nanochat_jax.config.training import (
    DATA_DIR_HELP,
    DEVICE_TYPE_HELP,
    DEVICES,
    PACKING_HELP,
    PACKINGS,
    STAGES,
    TRAINING,
    UNTIMED_STEPS,
    Base,
    Doctor,
    LaterStage,
    Mid,
    ModelFlags,
    Rl,
    Sft,
    Train,
)

__all__ = [
    "DATA_DIR_HELP", "DEVICES", "DEVICE_TYPE_HELP", "PACKINGS", "PACKING_HELP", "REPOSITORY", "STAGES", "TRAINING",
    "UNTIMED_STEPS", "Base", "BaseEval", "BaseLoss", "ChatCli", "ChatEval", "ChatWeb", "Dataset", "Doctor", "GPTConfig",
    "LaterStage", "Load", "Mid", "ModelFlags", "Report", "Rl", "Settings", "Sft", "TokEval", "TokTrain", "Train",
    "UserError", "advice_for", "base_dir", "did_you_mean", "first_line", "setting", "user_path",
]  # fmt: skip
