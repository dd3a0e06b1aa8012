"""What scripts.doctor prints about a run on GPUs that are not there."""

import math
from collections import Counter
from typing import Any

from nanochat_jax import config
from nanochat_jax.config import GPTConfig
from nanochat_jax.forecast import roofline
from nanochat_jax.forecast.card import Target
from nanochat_jax.forecast.compiled import GIB, Compiled
from nanochat_jax.forecast.plan import Plan
from nanochat_jax.forecast.programs import CHUNK
from nanochat_jax.forecast.roofline import COMMUNICATION, PARTS, Roofline
from nanochat_jax.progress import clock, count_of
from nanochat_jax.training.passes import horizon

BOUND = (
    "A BOUND, NOT A MEASUREMENT: no GPU was used. The times are those that the bytes and FLOPs of the program as "
    "it was compiled here take at the card's peaks and without launches; a real run is slower. Good kernels reach "
    "the shares of the peaks in the card's file. Memory does not count cuDNN's and NCCL's buffers."
)
BF16_BYTES = 2


def least_sent(cfg: config.Train, model_cfg: GPTConfig, plan: Plan) -> float:
    """The least bytes that each GPU must send in a step with this sharding, if everything travels in bf16.

    With --shard=optimizer, gradients are reduced and new weights are gathered once a step. With --shard=full, weights
    are gathered in the forward and again in the backward pass of each micro-batch. A ring of n GPUs sends (n-1)/n of an
    array to gather it or to reduce and scatter it. Between nodes, each GPU all-reduces its share of the gradients.
    Tensor parallelism all-reduces the activations four times in each layer and micro-batch, as in Megatron.
    """
    axes = plan.mesh.shape
    data, node, model = axes["data"], axes["node"], axes["model"]
    weights = BF16_BYTES * model_cfg.num_params / model
    passes = 2 * plan.shape.grad_accum_steps if cfg.shard == "full" else 1
    sent = (passes + 1) * weights * (data - 1) / data
    sent += 2 * weights / data * (node - 1) / node
    activations = BF16_BYTES * plan.shape.rows * model_cfg.sequence_len * model_cfg.n_embd
    sent += 4 * model_cfg.n_layer * plan.shape.grad_accum_steps * 2 * (model - 1) / model * activations
    return sent


def facts(cfg: config.Doctor, plan: Plan) -> dict[str, Any]:
    """Returns everything that is known about the run, as it is written to --json."""
    card, model_cfg, program = plan.target.card, plan.model_cfg, plan.step.program
    bound, usual = roofline.roofline(program, plan.target), roofline.roofline(program, plan.target, card.reachable)
    steps = horizon(cfg, model_cfg, plan.shape.tokens)
    flops = plan.shape.tokens * model_cfg.flops_per_token
    peak = card.bf16_tflops * 1e12 * plan.target.count
    found = {
        "what": BOUND,
        "target": {"card": card.name, "count": plan.target.count, "nodes": plan.target.nodes},
        "model": {"parameters": model_cfg.num_params, "depth": model_cfg.n_layer, "width": model_cfg.n_embd},
        "batch": {
            "rows": plan.shape.rows, "grad_accum_steps": plan.shape.grad_accum_steps,
            "replicas": plan.shape.replicas, "seq_len": plan.shape.seq_len, "tokens": plan.shape.tokens,
            "shape": str(plan.shape),
        },
        "memory": {
            "card": card.memory, "usable": plan.limit, "peak": plan.step.peak, "weights": plan.weights,
            "optimizer": plan.optimizer, "activations and gradients": plan.step.temporaries,
        },
        "kernels": program.count(),
        "cudnn": sum(kernel.times for kernel in program.kernels if kernel.is_attention),
        "collectives": collectives(plan.step),
        "sent": sum(k.times * k.sent for k in program.kernels if k.is_collective),
        "sent_at_least": least_sent(cfg, model_cfg, plan),
        "step": {name: _times(line, flops, peak, plan.shape.tokens, steps) for name, line in
                 (("bound", bound), ("with good kernels", usual))},
        "steps": steps,
        "compile_seconds": sum(p.seconds for p in (plan.step, plan.decode, plan.prefill) if p),
    }  # fmt: skip
    if cfg.price_per_hour:
        for line in found["step"].values():
            line["price"] = round(line["hours"] * cfg.price_per_hour, 2)
    one = Target(card, 1)
    if plan.decode and plan.prefill:
        line, loops = roofline.roofline(plan.decode.program, one), plan.decode.program.loops()
        found["decode"] = {
            "slots": plan.slots, "peak": plan.decode.peak, "seconds_per_token": line.seconds / CHUNK,
            "tokens_per_second": plan.slots * CHUNK / line.seconds,
            "kernels_per_token": max((kernels for count, kernels in loops if count == CHUNK), default=0),
        }  # fmt: skip
        line = roofline.roofline(plan.prefill.program, one)
        found["prefill"] = {
            "tokens": model_cfg.sequence_len, "peak": plan.prefill.peak, "seconds": line.seconds,
            "kernels": plan.prefill.program.count(),
        }  # fmt: skip
    return found


def collectives(program: Compiled) -> dict[str, dict[str, float]]:
    """How many collectives of each kind and dtype a program has, and how many bytes each GPU sends in them."""
    count: Counter[str] = Counter()
    sent: dict[str, float] = {}
    for kernel in program.program.kernels:
        if kernel.is_collective and not kernel.done and kernel.sent > 1000:  # leaves out single numbers
            name = f"{kernel.op} {kernel.dtype}"
            count[name] += kernel.times
            sent[name] = sent.get(name, 0.0) + kernel.times * kernel.sent
    return {name: {"count": count[name], "bytes": sent[name]} for name in sorted(count)}


def _times(line: Roofline, flops: float, peak: float, tokens: int, steps: int) -> dict[str, Any]:
    return {
        "seconds": line.seconds, "mfu": flops / line.seconds / peak, "tokens_per_second": tokens / line.seconds,
        "hours": steps * line.seconds / 3600, "hidden_communication": line.hidden,
        "parts": {
            name: {"seconds": part.seconds, "kernels": part.kernels, "bytes": part.bytes, "flops": part.flops}
            for name, part in line.parts.items() if part.kernels
        },
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the report's lines, as pairs of a name and a text."""
    memory, batch, step = found["memory"], found["batch"], found["step"]
    gib = {name: f"{size / GIB:.1f}" for name, size in memory.items()}
    rows = [
        ("Fits", f"yes, with {count_of(batch['rows'], 'row')} on each replica: {batch['tokens']:,} tokens a step = "
         f"{batch['shape']} x {batch['seq_len']}"),
        ("Peak memory", f"{gib['peak']} GiB on each GPU: {gib['weights']} weights, {gib['optimizer']} optimizer, "
         f"{gib['activations and gradients']} activations and gradients; a run may use {gib['usable']} of "
         f"{gib['card']}"),
        ("Kernels", f"{found['kernels']:,} a step, {found['cudnn']} of them cuDNN's attention"),
    ]  # fmt: skip
    kinds = [f"{n['count']} {kind} ({n['bytes'] / 1e6:,.0f} MB)" for kind, n in found["collectives"].items()]
    if kinds:
        least, sent = found["sent_at_least"], found["sent"]
        ratio = (
            f", {sent / least:.2f} times the minimum of this sharding ({least / 1e6:,.0f} MB, in bf16)" if least else ""
        )
        rows.append(("Collectives", f"{', '.join(kinds)}: each GPU sends {sent / 1e6:,.0f} MB a step{ratio}"))
    rows.append(("Parts of a step", "at the card's peaks (with good kernels)"))
    for name, part in step["bound"]["parts"].items():
        usual = step["with good kernels"]["parts"][name]
        hidden = ""
        if name == COMMUNICATION and step["bound"]["hidden_communication"] > 1e-5:
            hidden = f", and {1000 * step['bound']['hidden_communication']:.1f} ms beside kernels"
        tflop = f", {part['flops'] / 1e12:.1f} TFLOP" if part["flops"] else ""
        rows.append((
            f"  {name}", f"{1000 * part['seconds']:.1f} ms ({1000 * usual['seconds']:.1f}), {part['kernels']:,} kernels"
            f", {part['bytes'] / GIB:.1f} GiB{tflop}{hidden}",
        ))  # fmt: skip
    for name, label in (("bound", "At best"), ("with good kernels", "With good kernels")):
        line = step[name]
        price = f", ${line['price']:,.2f}" if "price" in line else ""
        rows.append((
            label, f"{1000 * line['seconds']:.0f} ms a step, MFU {line['mfu']:.1%}, {line['tokens_per_second']:,.0f} "
            f"tokens/s; {found['steps']:,} steps in {clock(3600 * line['hours'])}{price}",
        ))  # fmt: skip
    if "decode" in found:
        decode, prefill = found["decode"], found["prefill"]
        rows.append((
            "Generating", f"on one GPU, {decode['slots']} answers at once: at best "
            f"{1000 * decode['seconds_per_token']:.2f} ms a token, "
            f"{decode['tokens_per_second']:,.0f} tokens/s, {decode['kernels_per_token']} kernels a token; "
            f"a prompt of {prefill['tokens']:,} tokens {1000 * prefill['seconds']:.1f} ms; "
            f"{max(decode['peak'], prefill['peak']) / GIB:.1f} GiB",
        ))  # fmt: skip
    rows.append(("Compiled in", f"{found['compile_seconds']:.0f} s"))
    assert math.isfinite(step["bound"]["seconds"]) and set(step["bound"]["parts"]) <= set(PARTS)
    return rows
