"""Reads the text of a program that XLA has compiled and scheduled for a GPU: its kernels, their bytes and FLOPs.

XLA prints a program as a list of computations. Each instruction of the entry computation, and of the loops that it
calls, is one kernel, unless it only names or regroups arrays. A fusion is one kernel: it reads its operands from memory
and writes its result, and what happens in between stays on the chip.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
}  # fmt: skip
# Instructions that launch nothing.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "async-done", "async-update", "copy-done", "send-done", "recv-done",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = {"dynamic-slice", "slice", "gather"}  # these read only a part of their first operand
ATTENTION = "fmha"  # a part of the names of cuDNN's attention kernels


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands: attributes, metadata and the backend's settings
    root: bool

    @functools.cached_property
    def source(self) -> str:
        """The JAX scopes and the operation that it comes from, such as "jit(step)/block0/mlp/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """The name of the computation that it calls, or ""."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The name of the library function that a custom call calls, or ""."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Kernel:
    """A kernel, a call of a library, or a collective operation."""

    name: str
    op: str  # "fusion", "custom-call", one of COLLECTIVES, ...
    times: int  # how often it runs in one call of the program
    bytes: float  # read from and written to the GPU's memory, each time
    flops: float  # of its matmuls, each time
    dtype: str  # of the operands of its matmuls, or of what a collective sends
    source: str
    target: str = ""
    group: tuple[int, ...] = ()  # a collective: the devices that take part
    payload: float = 0  # a collective: the bytes of its whole array, before it is scattered or after it is gathered
    done: bool = False  # the place where the program waits for the collective of the same name

    @property
    def is_collective(self) -> bool:
        return self.op in COLLECTIVES

    @property
    def is_attention(self) -> bool:
        return ATTENTION in self.target

    @property
    def sent(self) -> float:
        """The least bytes that each device of a collective sends, each time."""
        n = len(self.group)
        if n < 2:
            return 0
        share = 1 if self.op == "collective-permute" else (n - 1) / n
        return self.payload * share * (2 if self.op == "all-reduce" else 1)


class Program:
    """A compiled program."""

    def __init__(self, text: str, devices: int = 1):
        self.devices = devices
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if line.startswith("  "):
                if instruction := _instruction(line):
                    current.append(instruction)
            elif header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault(header[2], [])
                if header[1]:
                    self.entry = header[2]
        assert self.entry, "the text is not that of a compiled program"
        self.shapes = {i.name: i.shape for instructions in self.computations.values() for i in instructions}

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """All kernels, in the order in which they are launched. The kernels of a loop appear once."""
        return list(self._kernels(self.entry, 1))

    def count(self) -> int:
        """How many kernels, calls of libraries and collectives one call of the program launches."""
        return sum(kernel.times for kernel in self.kernels if not kernel.done)

    def loops(self) -> list[tuple[int, int]]:
        """(number of iterations, kernels in one iteration) of every loop."""
        found = []
        for instructions in self.computations.values():
            for i in instructions:
                if i.op == "while":
                    body = sum(k.times for k in self._kernels(i.called("body"), 1) if not k.done)
                    found.append((_trips(i), body))
        return found

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        for i in self.computations[computation]:
            base = re.sub(r"-(start|done)$", "", i.op)
            if base in COLLECTIVES:
                yield self._collective(i, base, times)
            elif i.op == "while":
                yield from self._kernels(i.called("body"), times * _trips(i))
            elif i.op in ("call", "async-start"):
                yield from self._kernels(i.called("to_apply") or i.called("calls"), times)
            elif i.op == "conditional":
                yield from self._cheapest_branch(i, times)
            elif i.op not in FREE:
                yield self._kernel(i, times)

    def _cheapest_branch(self, i: Instruction, times: int) -> list[Kernel]:
        names = re.findall(r"%([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", i.rest) or ["", ""])[1])
        names = names or [i.called("true_computation"), i.called("false_computation")]
        branches = [list(self._kernels(name, times)) for name in names if name]
        return min(branches, key=lambda kernels: sum(k.bytes * k.times for k in kernels), default=[])

    def _kernel(self, i: Instruction, times: int) -> Kernel:
        inside = self.computations.get(i.called("calls"), [])
        source = i.source or next((x.source for x in reversed(inside) if x.source), "")
        if i.op == "fusion":
            # The fusion's own name is that of its last operation. The scope that most of its operations have says
            # better where it belongs.
            scopes = Counter(x.source.rpartition("/")[0] for x in inside if x.source and x.op not in FREE)
            if not i.source and scopes:
                source = scopes.most_common(1)[0][0]
            flops, dtype = self._flops(i.called("calls"))
            return Kernel(i.name, i.op, times, self._fusion_bytes(i), flops, dtype, source)
        moved = size(i.shape) + sum(size(self.shapes.get(name, "")) for name in i.operands)
        if i.op in SLICES:
            moved = 2 * size(i.shape)
        elif i.op == "dynamic-update-slice":
            moved = 2 * size(self.shapes.get(i.operands[1], ""))
        flops, dtype = self._products(i)
        return Kernel(i.name, i.op, times, moved, flops, dtype, source, i.target)

    def _collective(self, i: Instruction, op: str, times: int) -> Kernel:
        if i.op.endswith("-done"):
            return Kernel(i.operands[0], op, times, 0, 0, "", i.source, done=True)
        whole = sum(size(self.shapes.get(name, "")) for name in i.operands)
        group = _group(i.rest, self.devices)
        if op == "all-gather":
            whole *= len(group)
        dtype = next(iter(re.findall(r"(\w+)\[", self.shapes.get(i.operands[0], "") or i.shape)), "")
        return Kernel(i.name, op, times, 0, 0, dtype, i.source, group=group, payload=whole)

    def _fusion_bytes(self, fusion: Instruction) -> float:
        """The bytes that a fusion reads and writes. Of an array that it slices or updates, it moves only a part."""
        inside = self.computations[fusion.called("calls")]
        users: dict[str, list[Instruction]] = {}
        for i in inside:
            for name in i.operands:
                users.setdefault(name, []).append(i)

        def read(name: str, whole: float) -> float:
            total = 0.0
            for user in users.get(name, []):
                if user.op == "bitcast":
                    total += read(user.name, whole)
                elif user.op in SLICES and user.operands[0] == name:
                    total += size(user.shape)
                elif user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                    continue  # it is updated in place
                else:
                    return whole
            return min(total, whole)

        def written(i: Instruction) -> float:
            by_name = {x.name: x for x in inside}
            if i.op == "tuple":
                return sum(written(by_name[name]) for name in i.operands if name in by_name)
            if i.op == "bitcast" and i.operands[0] in by_name:
                return written(by_name[i.operands[0]])
            if i.op in ("dynamic-update-slice", "scatter"):
                return size(by_name[i.operands[1 if i.op == "dynamic-update-slice" else -1]].shape)
            return size(i.shape)

        reads = sum(read(i.name, size(i.shape)) for i in inside if i.op == "parameter")
        return reads + sum(written(i) for i in inside if i.root)

    def _flops(self, computation: str) -> tuple[float, str]:
        """The FLOPs of all matmuls in a computation, and the dtype of the largest one's operands."""
        total, largest, dtype = 0.0, 0.0, ""
        for i in self.computations.get(computation, []):
            flops, kind = self._products(i)
            if called := i.called("calls"):
                more, inner = self._flops(called)
                flops, kind = flops + more, kind or inner
            total += flops
            if flops > largest:
                largest, dtype = flops, kind
        return total, dtype

    def _products(self, i: Instruction) -> tuple[float, str]:
        """The FLOPs of a matmul or of cuDNN's attention, and the dtype of its operands."""
        if ATTENTION in i.target:
            return _attention_flops(i), "bf16"
        if "triton" in i.target:
            return self._fused_product(i)
        is_product = i.op == "dot" or "gemm" in i.target or "matmul" in i.target
        contracted = re.search(r'lhs_contracting_(?:dims=\{|dimensions": ?\[)([\d",]*)', i.rest) if is_product else None
        if not contracted:
            return 0.0, ""
        left = self.shapes.get(i.operands[0], "")
        dims = dimensions(left)
        inner = math.prod(dims[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
        result = re.sub(r"^\((.*?\]).*", r"\1", i.shape)  # cuBLAS returns its workspace, too
        return 2.0 * math.prod(dimensions(result)) * inner, left.partition("[")[0]

    def _fused_product(self, i: Instruction) -> tuple[float, str]:
        """The FLOPs of a kernel of model/fused, if it multiplies x [m, k] by a weight [k, n] or [n, k]."""
        shapes = [self.shapes.get(name, "") for name in i.operands[:2]]
        if len(shapes) < 2 or i.shape.startswith("("):
            return 0.0, ""
        x, w, y = (dimensions(shape) for shape in (*shapes, i.shape))
        if not len(x) == len(w) == len(y) == 2 or x[0] != y[0] or w not in ([x[1], y[1]], [y[1], x[1]]):
            return 0.0, ""
        return 2.0 * x[0] * x[1] * y[1], shapes[0].partition("[")[0]


def _instruction(line: str) -> Instruction | None:
    """Parses "  ROOT %name = shape op(operands), attributes"."""
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    shape, opened = line[at:end], line.index("(", end)
    closed = _closing(line, opened)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opened:closed]))
    return Instruction(head[2], shape, line[end:opened].strip(), operands, line[closed + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:100]}")


def size(shape: str) -> float:
    """The bytes of an array or of a tuple of arrays, such as "(bf16[2,3]{1,0}, f32[])"."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in found)


def dimensions(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _trips(loop: Instruction) -> int:
    """How often a loop's body runs. XLA knows it for loops of a fixed length; other loops count once."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else 1


def _attention_flops(i: Instruction) -> float:
    """The FLOPs of the matmuls in cuDNN's attention: two forward and five backward, of the visible pairs."""
    q, k, *_ = (dimensions(shape) for shape in re.findall(r"\w+\[[\d,]*\]", i.rest.partition("layout_constraints")[2]))
    b, t, h, d = q
    window = int((re.search(r'sliding_window_length": ?"?(\d+)', i.rest) or [0, 0])[1])
    pairs = float(t * k[1])
    if window or '"CAUSAL"' in i.rest:
        pairs = float(sum(min(position + 1, window or t) for position in range(t)))
    return 2.0 * b * h * d * pairs * (5 if "Backward" in i.target else 2)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that take part in a collective.

    XLA writes groups in three ways: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'b'}.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, found[1].split(",")))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        places = np.arange(math.prod(source)).reshape(source)
        if found[3]:
            places = places.transpose([int(n) for n in found[3].split(",")])
        return tuple(places.reshape(shape)[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        places = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        wanted = re.findall(r"'(\w+)'", found[2])
        return tuple(places[tuple(slice(None) if name in wanted else 0 for name in sizes)].ravel().tolist())
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(map(int, found.groups()))
    return tuple(range(devices))
