"""What tests look for in programs that were compiled for GPUs that are not there (`nanochat_jax/forecast`).

Every checked program adds a row to the file that the environment variable AOT_TABLE names, for the table in
BENCHMARKS.md.
"""

import math
import os
import re

from jax.sharding import Mesh

from nanochat_jax.forecast import card, compiled, report
from nanochat_jax.forecast.card import Target
from nanochat_jax.forecast.compiled import GIB, Compiled

H100 = card.read(card.CARDS / "h100.toml")


def mesh_of_h100s(node: int = 1, data: int = 1, model: int = 1) -> Mesh:
    """A mesh of H100s. Up to eight of them are in one node, however large its axis `node` is."""
    return compiled.mesh_of(Target(H100, node * data * model), f"node={node},data={data},model={model}")


def lines(program: Compiled, pattern: str) -> list[str]:
    return [line.strip() for line in program.text.splitlines() if re.search(pattern, line)]


def sorts(program: Compiled, width: int) -> list[str]:
    """Sorts of rows that have at least `width` entries."""
    return [line for line in lines(program, r"\bsort\(") if max(_dims(line), default=0) >= width]


def products(program: Compiled, dtype: str, elements: int) -> list[str]:
    """Matrix products with an operand of this dtype that has at least `elements` elements."""
    found = []
    for line in lines(program, r"\b(dot|custom-call)\("):
        if " dot(" not in line and "gemm" not in line and "matmul" not in line:
            continue
        operands = re.findall(rf"\b{dtype}\[([0-9,]*)\]", line.split("(", 1)[1])
        found += [line for dims in operands if math.prod(map(int, filter(None, dims.split(",")))) >= elements]
    return found


def loop_bodies(program: Compiled) -> str:
    """The text of all computations that are the body of a loop."""
    bodies = set(re.findall(r"body=(%?[\w.-]+)", program.text))
    parts = re.split(r"\n(?=%|ENTRY)", program.text)
    return "\n".join(part for part in parts if part.split(" ", 1)[0] in bodies)


def collectives(program: Compiled, kind: str) -> list[str]:
    return lines(program, rf"\b{kind}(-start)?\(")


def _dims(line: str) -> list[int]:
    return [int(n) for dims in re.findall(r"\w+\[([0-9,]+)\]", line) for n in dims.split(",")]


def record(program: Compiled, name: str) -> None:
    """Prints what a program needs, and adds it to the table."""
    kinds = report.collectives(program)
    sent = sum(kind["bytes"] for kind in kinds.values())
    found = ", ".join(f"{kind['count']} {name}" for name, kind in kinds.items()) or "none"
    print(
        f"{name}: {program.peak / GIB:.1f} GiB, of these {program.temporaries / GIB:.1f} temporary; "
        f"{program.program.count():,} kernels; {found}, {sent / 1e6:,.0f} MB sent; {program.seconds:.0f} s"
    )
    if path := os.environ.get("AOT_TABLE"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(
                f"| {name} | {program.peak / GIB:.1f} | {program.temporaries / GIB:.1f} | "
                f"{program.program.count():,} | {found} | {sent / 1e6:,.0f} |\n"
            )
