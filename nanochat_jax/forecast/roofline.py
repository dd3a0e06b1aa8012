"""A lower bound on the time of a compiled program: what its bytes and FLOPs take at a card's peaks.

A kernel takes at least as long as its bytes take at the bandwidth of the memory, and as its matmuls take at the
peak of the tensor cores. Kernels run one after the other, and collectives beside the kernels between their start and
their end. Launches take no time here, and every kernel is as good as the card: the sum is a bound, not a measurement.
"""

import re
from dataclasses import dataclass, field

from nanochat_jax.forecast.card import Reachable, Target
from nanochat_jax.forecast.hlo import Kernel, Program

PEAK = Reachable(matmuls=1, attention=1, memory=1)
COMMUNICATION = "communication"
# The parts of a program, and the JAX scopes whose kernels belong to them. The first part that matches counts.
SCOPES = {
    "optimizer": r"\b(optimizer|muon)\b",
    "loss": r"\bloss\b",
    "norms": r"\bnorm\b",
    "rotary": r"\brope\b",
    "attention": r"\battention\b",
    "activations of the MLP": r"\bmlp\b",
}
PARTS = ("matmuls", *SCOPES, COMMUNICATION, "other")


@dataclass
class Part:
    """What belongs together in a program. All figures are those of one call on one device."""

    seconds: float = 0
    kernels: int = 0
    bytes: float = 0  # read and written; of collectives, those that a device sends
    flops: float = 0


@dataclass
class Roofline:
    """A bound on the time of one call of a program."""

    seconds: float = 0
    hidden: float = 0  # seconds of communication beside kernels, which do not count
    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})


def part_of(kernel: Kernel) -> str:
    """The name of the part to which a kernel belongs."""
    if kernel.is_collective:
        return COMMUNICATION
    if kernel.is_attention:
        return "attention"
    if re.search(SCOPES["optimizer"], kernel.source):
        return "optimizer"
    if kernel.flops:
        return "matmuls"
    return next((name for name, scope in SCOPES.items() if re.search(scope, kernel.source)), "other")


def seconds_of(kernel: Kernel, target: Target, shares: Reachable = PEAK) -> float:
    """The least seconds that a kernel takes each time, at these shares of the card's peaks."""
    card = target.card
    if kernel.is_collective:
        link, node = sent_within_and_across(kernel, target)
        return max(link / (card.link_gb_per_s * 1e9), node / (card.node_gb_per_s * 1e9))
    peak = card.bf16_tflops
    if kernel.dtype.startswith("f8") and card.fp8_tflops:
        peak = card.fp8_tflops
    share = shares.attention if kernel.is_attention else shares.matmuls
    return max(kernel.bytes / (card.memory_gb_per_s * 1e9 * shares.memory), kernel.flops / (peak * 1e12 * share))


def sent_within_and_across(kernel: Kernel, target: Target) -> tuple[float, float]:
    """The least bytes that each device of a collective sends within its node, and to other nodes.

    Between nodes, the devices of a node share the work: together they send every byte once.
    """
    per_node = target.count // target.nodes
    nodes = len({device // per_node for device in kernel.group})
    if nodes < 2:
        return kernel.sent, 0
    local = len(kernel.group) / nodes
    twice = 2 if kernel.op == "all-reduce" else 1
    within = kernel.payload * (local - 1) / local * twice
    return within, kernel.payload * (nodes - 1) / nodes / local * twice


def roofline(program: Program, target: Target, shares: Reachable = PEAK) -> Roofline:
    """Returns the bound of one call of a program, in all and by part."""
    total = Roofline()
    now = link_free = 0.0  # seconds since the call began
    ends: dict[str, float] = {}  # when each collective that has started will end
    asynchronous = {kernel.name for kernel in program.kernels if kernel.done}
    for kernel in program.kernels:
        part = total.parts[part_of(kernel)]
        if kernel.done:
            waited = max(0.0, ends.pop(kernel.name, now) - now)
            part.seconds += waited
            now += waited
            continue
        seconds = kernel.times * seconds_of(kernel, target, shares)
        part.kernels += kernel.times
        part.bytes += kernel.times * (kernel.sent if kernel.is_collective else kernel.bytes)
        part.flops += kernel.times * kernel.flops
        if kernel.name in asynchronous:
            ends[kernel.name] = link_free = max(now, link_free) + seconds
            total.hidden += seconds
        else:
            part.seconds += seconds
            now += seconds
    total.seconds = now
    total.hidden = max(0.0, total.hidden - total.parts[COMMUNICATION].seconds)
    return total
