"""Compiles csrc/cuda, and counts the instructions that a thread executes in a kernel's loops.

The machine code has several ways through a loop: an octet may lie in several tensors, at any address, in any dtype, and
some sums are computed again in float64. Counted is the way that real models take almost always: the one that moves the
most units of 16 bytes, among those the one with the most products, roots and reciprocals, since no element and no term
is left out there, and among those the one with the fewest instructions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import networkx as nx
from torch.utils.cpp_extension import include_paths

from ..common.command import ROOT

CSRC = ROOT / "csrc"


def nvcc() -> str | None:
    """The one that setup.py takes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" where it is always executed
    opcode: str
    operands: str

    @property
    def moves_unit(self) -> bool:
        return self.opcode.startswith(("LDG", "STG")) and ".128" in self.opcode

    def registers(self) -> tuple[set[int], set[int]]:
        """The four that a unit is loaded to, if this loads one, and those that are read."""
        first, _, rest = self.operands.partition(",")
        target = re.fullmatch(r"R(\d+)(\.reuse)?", first)
        loaded, read = set[int](), set[int]()
        if target and self.moves_unit:
            loaded = {int(target[1]) + i for i in range(4)}
        for number, wide in re.findall(r"\bR(\d+)(\.64)?", rest if target else self.operands):
            read |= {int(number), int(number) + 1} if wide or self.opcode.startswith("D") else {int(number)}
        return loaded, read


class Function(NamedTuple):
    """A kernel's machine code."""

    name: str  # mangled
    registers: int
    shared_bytes: int
    spilled_bytes: int
    code: list[Instruction]


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+) )?([A-Z0-9_.]+)([^;]*);")
_USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


def compiled(source: Path, architecture: str, folder: Path) -> list[Function]:
    """Every kernel of a source file."""
    target = folder / f"{source.stem}_{architecture}.cubin"
    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    options = ["-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-Xptxas=-v"]
    build = subprocess.run(
        [str(nvcc()), *options, *defines, *includes, str(source), "-o", str(target)], capture_output=True, text=True
    )
    if build.returncode != 0:
        raise RuntimeError(build.stderr)
    code = subprocess.run([str(cuobjdump()), "-sass", str(target)], capture_output=True, text=True, check=True)
    report = build.stderr.replace("\n", " ").replace("Compiling entry function", "\nCompiling entry function")
    usage = {name: [int(n or 0) for n in numbers] for name, *numbers in _USAGE.findall(report)}
    functions = []
    for text in code.stdout.split("Function : ")[1:]:
        name = text.split()[0]
        spilled, registers, shared = usage[name]
        instructions = [
            Instruction(int(address, 16), predicate, opcode, operands.strip())
            for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
        ]
        functions.append(Function(name, registers, shared, spilled, instructions))
    return functions


@dataclass
class Loop:
    """A loop that moves units. ``executed`` counts opcodes of one iteration, without those of the loops inside.
    ``requested`` are the units that an iteration loads before it waits for one of them."""

    executed: Counter[str] = field(default_factory=Counter)
    requested: int = 0
    inside: list[Loop] = field(default_factory=list)


def _blocks(code: list[Instruction]) -> tuple[nx.DiGraph, dict[int, list[Instruction]]]:
    """The control flow between blocks of instructions, each named by its first address."""
    following = {a.address: b.address for a, b in pairwise(code)}
    targets: dict[int, list[int]] = {}
    for instruction in code:
        address, predicate, opcode, operands = instruction
        kind, after = opcode.partition(".")[0], following.get(address)
        ahead = [] if after is None else [after]
        if kind in ("EXIT", "RET"):
            targets[address] = ahead if predicate else []
        elif opcode.startswith("BRA.DIV"):  # a warp that has diverged before a shuffle
            targets[address] = ahead
        elif kind == "BRA" or (kind == "CALL" and predicate):  # a conditional call leaves a loop
            target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
            always = kind == "BRA" and not predicate and operands.startswith("0x")
            targets[address] = [target] if always else [target, *ahead]
    firsts = {code[0].address, *(t for ts in targets.values() for t in ts)}
    firsts |= {following[address] for address in targets if address in following}
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in firsts:
            block = blocks.setdefault(instruction.address, [])
        block.append(instruction)
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    for first, block in blocks.items():
        last = block[-1].address
        graph.add_edges_from(
            (first, target) for target in targets.get(last, [following[last]] if last in following else [])
        )
    return graph.subgraph({code[0].address, *nx.descendants(graph, code[0].address)}).copy(), blocks


def _loop_bodies(graph: nx.DiGraph, entry: int) -> dict[int, set[int]]:
    """The blocks of each natural loop, by its first block."""
    dominators = nx.immediate_dominators(graph, entry)

    def dominates(block: int, other: int) -> bool:
        while other != block and other != entry:
            other = dominators[other]
        return other == block

    bodies: dict[int, set[int]] = {}
    for last, first in graph.edges:
        if dominates(first, last):
            without_first = graph.subgraph(set(graph) - {first})
            body = {first, last} | (nx.ancestors(without_first, last) if last != first else set())
            bodies.setdefault(first, set()).update(body)
    return bodies


def _requested(instructions: list[Instruction]) -> tuple[int, bool]:
    """Units that are loaded before an instruction reads one of them, and whether one does."""
    loaded: set[int] = set()
    units = 0
    for instruction in instructions:
        target, read = instruction.registers()
        if read & loaded:
            return units, True
        loaded |= target
        units += bool(target)
    return units, False


def hot_loops(function: Function, product: str) -> list[Loop]:
    """The outermost loops that move units, in the order of their code. ``product`` is the opcode of a product with a
    sum in the kernel's arithmetic: where that is float32, what is computed again in float64 is no reason for a way."""
    graph, blocks = _blocks(function.code)
    bodies = _loop_bodies(graph, function.code[0].address)
    forward = graph.copy()
    forward.remove_edges_from([(a, b) for a, b in graph.edges if b in bodies and a in bodies[b]])
    units = {first: sum(i.moves_unit for i in block) for first, block in blocks.items()}
    hot = {first: body for first, body in bodies.items() if any(units[block] for block in body)}

    def loop_at(first: int) -> Loop:
        nested = [other for other in hot if other != first and other in hot[first]]
        inside = {block for other in nested for block in hot[other]}
        best: dict[int, tuple[tuple[int, int, int], list[int]]] = {}
        for block in nx.topological_sort(forward.subgraph(hot[first])):
            before = [best[previous] for previous in forward.predecessors(block) if previous in best]
            if block != first and not before:
                continue
            (moved, special, fewer), way = max(before, default=((0, 0, 0), []))
            if block not in inside:
                special += sum(i.opcode.startswith(("MUFU", product)) for i in blocks[block])
                moved, fewer = moved + units[block], fewer - len(blocks[block])
            best[block] = (moved, special, fewer), [*way, block]
        ends = [best[block] for block in graph.predecessors(first) if block in best and block in hot[first]]
        _, way = max(ends)
        executed = Counter(i.opcode for block in way if block not in inside for i in blocks[block])
        outermost = [o for o in nested if not any(o in hot[other] for other in nested if other != o)]
        loops = [loop_at(other) for other in sorted(outermost)]
        ahead = list(takewhile(lambda block: block not in inside, way))
        requested, waits = _requested([i for block in ahead for i in blocks[block]])
        return Loop(executed, requested + (loops[0].requested if loops and not waits else 0), loops)

    return [loop_at(f) for f in sorted(hot) if not any(f in body for other, body in hot.items() if other != f)]
