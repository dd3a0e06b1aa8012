"""Runs one measurement of a PyTorch training step for `python -m scripts.bench train`.

The benchmark pipes this file into the peer's Python, which has torch. The only argument is the job as JSON. The last
line of output is one line of JSON. This file imports nothing from this project, because the peer's Python may lack it.
The clock of the first step starts before torch is imported.
"""

from __future__ import annotations  # the peer's Python may be an older version

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

START = time.perf_counter()  # the first step is timed from here
WARM_UP = 3  # steps before the clock starts
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADAMW = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
LEARNING_RATES = {"embedding": 0.2, "head": 0.004, "matrices": 0.02}


def probe(job: dict) -> dict:
    """Returns the versions of torch and transformers, or why one of them cannot be imported, as `missing`."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "missing": {}}
    for name in ("torch", "transformers"):
        try:
            __import__(name)
            if name == "transformers":
                from transformers import NanoChatForCausalLM  # noqa: F401  # ty: ignore[import-not-found]
            found[name] = metadata.version(name)
        except Exception as error:  # importing a broken package may raise any exception
            found["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def measure(job: dict, build: Callable[[dict, Any], tuple[Callable, list, str]]) -> dict:
    """Measures a training step. The result has the same meaning as that of `ours` in train_job.py.

    Of the programs, "loss" is the forward pass with the loss, and "gradients" also has the backward pass. Inside a
    step, the time from its start to the end of each is measured, on a device that has nothing else to do.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = job["cache"]
    import torch  # ty: ignore[import-not-found]

    where = torch.device("cuda" if job["platform"] == "gpu" else "cpu")
    if where.type == "cuda" and job["dtype"] == "float32":
        torch.set_float32_matmul_precision("highest")  # as in our step
    torch.manual_seed(0)
    shape = job["shape"]
    loss_of, optimizers, attention = build(job, where)
    ids = torch.randint(0, shape["vocab_size"], (job["rows"], shape["sequence_len"] + 1), device=where)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def now() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def one_step(clock: Callable[[], float] = time.perf_counter) -> tuple[Any, list[float]]:
        times = [clock()]
        loss = loss_of(inputs, targets)
        times.append(clock())
        loss.backward()
        times.append(clock())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        times.append(clock())
        return loss.detach(), times

    def loop(steps: int) -> tuple[list[float], float]:
        """Reads the loss of a step after it has started the next one, like our loop."""
        laps, value, pending, last = [], float("nan"), None, now()
        for _ in range(steps + 2):
            loss, _times = one_step()
            if pending is not None:
                value, time_now = float(pending), time.perf_counter()
                laps.append(time_now - last)
                last = time_now
            pending = loss
        return laps[1:], value

    float(one_step()[0])
    first = now() - START
    loop(WARM_UP)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    steps, loss = loop(job["steps"])
    peak = torch.cuda.max_memory_allocated() if where.type == "cuda" else peak_of_process()
    clocks = [one_step(now)[1] for _ in range(job["repeats"])]
    programs = {
        name: statistics.median(times[i] - times[0] for times in clocks)
        for i, name in enumerate(("loss", "gradients", "step"), 1)
    }
    return {
        "first": first, "steps": steps, "programs": programs, "communication": 0.0, "peak": peak, "loss": loss,
        "attention": attention,
    }  # fmt: skip


def autocast(job: dict, where: Any) -> Any:
    """Returns a context in which matmuls are computed in the job's dtype. The weights stay float32."""
    import torch  # ty: ignore[import-not-found]

    return torch.autocast(where.type, torch.bfloat16, enabled=job["dtype"] == "bfloat16")


# -----------------------------------------------------------------------------
# transformers


def hf(job: dict, where: Any) -> tuple[Callable, list, str]:
    """transformers' NanoChat, with AdamW for the embedding and the head, and a batched Muon for the matrices."""
    import torch  # ty: ignore[import-not-found]
    from transformers import NanoChatConfig, NanoChatForCausalLM  # ty: ignore[import-not-found]

    shape, dtype = job["shape"], getattr(torch, job["dtype"])
    config = NanoChatConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"], intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"], max_position_embeddings=shape["sequence_len"], pad_token_id=None,
    )  # fmt: skip
    model, attention = None, ""
    # The fastest first. FlashAttention computes only on GPUs, and not in float32.
    fast = ["flash_attention_3", "flash_attention_2"] if where.type == "cuda" and job["dtype"] == "bfloat16" else []
    for attention in [*fast, "sdpa"]:
        try:
            model = NanoChatForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)
            break
        except (ImportError, ValueError):  # the package of this kernel is not installed
            continue
    assert model is not None, "transformers has no sdpa attention"
    model = model.to(where).train()

    @torch.compile(dynamic=False)
    def loss_of(ids: Any) -> Any:  # the logits are no result, so that they need not be kept
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def loss(inputs: Any, targets: Any) -> Any:
        with autocast(job, where):
            return loss_of(inputs)

    factor = (shape["n_embd"] / 768) ** -0.5
    adamw = [
        {"params": [model.model.embed_tokens.weight], "lr": LEARNING_RATES["embedding"] * factor},
        {"params": [model.lm_head.weight], "lr": LEARNING_RATES["head"] * factor},
    ]
    matrices = list(model.model.layers.parameters())
    return loss, [torch.optim.AdamW(adamw, fused=True, **ADAMW), muon(matrices, dtype)], attention


def muon(matrices: list, dtype: Any) -> Any:
    """Returns Muon for matrices [out, in]. All matrices of one shape are orthogonalized as one batch, in `dtype`."""
    import torch  # ty: ignore[import-not-found]

    @torch.compile(dynamic=False)
    def orthogonalize(g: Any) -> Any:
        a, b, c = NEWTON_SCHULZ
        x = g.to(dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return (x.mT if tall else x).to(g.dtype)

    class Muon(torch.optim.Optimizer):
        def __init__(self) -> None:
            shapes = sorted({tuple(p.shape) for p in matrices})
            groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
            super().__init__(groups, {"lr": LEARNING_RATES["matrices"], "momentum": 0.95})

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                params, momentum = group["params"], group["momentum"]
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                torch._foreach_lerp_(grads, buffers, momentum)  # Nesterov
                updates = orthogonalize(torch.stack(grads))
                out, into = params[0].shape
                rate = -group["lr"] * max(1.0, out / into) ** 0.5
                torch._foreach_add_(params, list(updates.unbind()), alpha=rate)

    return Muon()


# -----------------------------------------------------------------------------
# The original nanochat


def nanochat(job: dict, where: Any) -> tuple[Callable, list, str]:
    """The original's own model and optimizers, from a folder with its source.

    Older versions have muon.py and compute under autocast. Newer versions have optim.py, cast weights themselves, and
    read the dtype from the environment.
    """
    os.environ["NANOCHAT_DTYPE"] = job["dtype"]
    sys.path.insert(0, job["folder"])
    import torch  # ty: ignore[import-not-found]
    from nanochat.gpt import GPT, GPTConfig  # ty: ignore[import-not-found]

    shape = job["shape"]
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    modern = (Path(job["folder"]) / "nanochat" / "optim.py").is_file()
    windows = {"window_pattern": shape["window_pattern"]} if modern else {}
    with torch.device(where):
        model = GPT(GPTConfig(**{name: shape[name] for name in names}, **windows))
    model.init_weights()
    compiled = torch.compile(model, dynamic=False)
    if modern:
        from nanochat.flash_attention import USE_FA3  # ty: ignore[import-not-found]

        return compiled, [model.setup_optimizer()], "flash_attention_3" if USE_FA3 else "sdpa"

    def loss(inputs: Any, targets: Any) -> Any:
        with autocast(job, where):
            return compiled(inputs, targets)

    return loss, model.setup_optimizers(), "sdpa"


# -----------------------------------------------------------------------------
# Memory of this process, as in train_job.py


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_of_process() -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if job["job"] == "probe":
        print(json.dumps(probe(job)))
    else:
        print(json.dumps(measure(job, {"hf": hf, "nanochat": nanochat}[job["job"]])))
