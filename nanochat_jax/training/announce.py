"""Before the first step of a run, prints the model, the batch, the number of steps, the FLOPs and the expected time."""

from nanochat_jax.config import GPTConfig
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.progress import clock, count_of
from nanochat_jax.training.batch_shape import BatchShape
from nanochat_jax.training.run import Run


def announce(run: Run, batch_shape: BatchShape, steps: str, facts: dict[str, str]) -> None:
    """Prints the facts about a run, one per line.

    `steps` describes the number of steps. `facts` contains further facts that depend on the stage, as {name: value}.
    """
    model_cfg = run.model_cfg
    padding = f", less {count_of(batch_shape.padding, 'empty row')}" if batch_shape.padding else ""
    every = {
        "model": model_cfg.describe(),
        "parameters": f"{model_cfg.num_params:,}",
        "FLOPs per token": f"{model_cfg.flops_per_token:.3e}",
        "batch": f"{batch_shape.tokens:,} tokens = {batch_shape} x {batch_shape.seq_len}{padding}",
        "mesh": sharding.describe(run.layout.mesh),
        "steps": steps,
    }
    for name, value in (every | facts).items():
        print(f"  {name}: {value}")
    if run.cfg.dry_run:
        print("dry run: nothing was trained, and no run was written", flush=True)
    else:
        print("compiling the first step ...", flush=True)


def cost(model_cfg: GPTConfig, tokens: float, about: str = "", more: str = "") -> dict[str, str]:
    """Returns the total FLOPs of training on `tokens` tokens, and the expected time.

    `about` is a text before both figures, such as "at most ". `more` is a text after the time.
    """
    flops = tokens * model_cfg.flops_per_token
    seconds = devices.expected_seconds(flops)
    time = f"{about}{clock(seconds)} at an MFU of 50%" if seconds else ""
    unknown = "n/a: the peak FLOP/s of this device are not known; training shows an eta after a few steps"
    return {"total FLOPs": f"{about}{flops:.3e}", "expected time": (time or unknown) + more}
