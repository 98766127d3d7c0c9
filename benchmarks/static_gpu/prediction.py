"""From counted instructions to the time that each kind of GPU would need for them, and to the time of its memory."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .machine_code import Function, Loop

OCTET = 8  # elements that a thread handles at a time
THREADS = 256  # of a block
UNIT = 16  # bytes of the widest access
LATENCY = 700e-9  # seconds until memory answers: a typical figure, not one of these cards in particular


class Architecture(NamedTuple):
    """Results for each clock cycle and multiprocessor, from the CUDA C++ Programming Guide, "Throughput of Native
    Arithmetic Instructions"; and what one multiprocessor holds."""

    float32: int
    float64: int
    conversions: int  # from and to 64-bit types
    threads: int
    shared_bytes: int

    @property
    def product(self) -> str:
        """The opcode of a product with a sum, in the arithmetic that csrc/cuda has for this architecture."""
        return "DFMA" if self.float64 >= 32 else "FFMA"


class Card(NamedTuple):
    """One card of an architecture: the maker's figures."""

    architecture: str
    bytes_per_second: float
    multiprocessors: int
    clock: float  # Hz, the highest

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.bytes_per_second / self.multiprocessors / self.clock


ARCHITECTURES = {
    "75": Architecture(64, 2, 2, 1024, 64 << 10),
    "80": Architecture(64, 32, 16, 2048, 164 << 10),
    "86": Architecture(128, 2, 2, 1536, 100 << 10),
    "89": Architecture(128, 2, 2, 1536, 100 << 10),
    "90": Architecture(128, 64, 16, 2048, 228 << 10),
    "100": Architecture(128, 64, 16, 2048, 228 << 10),
    "120": Architecture(128, 2, 2, 1536, 100 << 10),
}
CARDS = {
    "T4": Card("75", 320e9, 40, 1.59e9),
    "A100": Card("80", 2039e9, 108, 1.41e9),
    "RTX 3090": Card("86", 936e9, 82, 1.70e9),
    "A10": Card("86", 600e9, 72, 1.70e9),
    "RTX 4090": Card("89", 1008e9, 128, 2.52e9),
    "L40S": Card("89", 864e9, 142, 2.52e9),
    "H100": Card("90", 3350e9, 132, 1.83e9),
    "H200": Card("90", 4800e9, 132, 1.83e9),
    "B200": Card("100", 8000e9, 148, 1.85e9),
    "RTX 5090": Card("120", 1792e9, 170, 2.41e9),
}
# For each cycle, on all of them. Products of integers (IMAD, which also moves registers) share the pipe of float32
# products, or half of it where that gives 128; other integer arithmetic, comparisons and selections have a pipe of
# their own: Nsight Compute's documentation, "Pipelines". Branches, barriers and uniform instructions are in neither.
ISSUED, PRODUCTS, INTEGER, SHUFFLES, L1_BYTES = 128, 64, 64, 32, 128
_INTEGER = ("LOP3", "PLOP3", "SHF", "SEL", "FSEL", "ISETP", "FSETP", "IADD3", "VIADD", "IABS", "PRMT", "LEA")
_INTEGER = (*_INTEGER, "IMNMX", "VIMNMX", "FMNMX", "MOV")


class Count(NamedTuple):
    """What a thread executes for an octet."""

    instructions: float
    float32: float
    float64: float
    conversions: float
    shuffles: float
    units: float
    products: float  # of integers
    integer: float

    def plus(self, other: Count, times: float = 1) -> Count:
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))

    def cycles(self, architecture: Architecture) -> float:
        """Of a multiprocessor, for one thread: those of its busiest part, since the parts work at the same time."""
        return max(
            self.instructions / ISSUED,
            (self.float32 + self.products) / architecture.float32,
            self.products / PRODUCTS,
            self.integer / INTEGER,
            self.float64 / architecture.float64,
            self.conversions / architecture.conversions,
            self.shuffles / SHUFFLES,
            self.units * UNIT / L1_BYTES,
        )


# bfloat16 instead of float32: one unit less for an octet, and eight conversions, which are shifts and products.
NARROWER = Count(OCTET - 1, 0, 0, 0, 0, units=-1, products=OCTET / 2, integer=OCTET / 2)


def _part(opcode: str) -> str:
    kind = opcode.partition(".")[0]
    if kind in ("FADD", "FMUL", "FFMA"):
        return "float32"
    if kind in ("DADD", "DMUL", "DFMA", "DSETP"):
        return "float64"
    if kind == "F2F" and "F64" in opcode:
        return "conversions"
    if kind == "SHFL":
        return "shuffles"
    if kind == "IMAD":
        return "products"
    if kind in _INTEGER:
        return "integer"
    return "units" if opcode.startswith(("LDG", "STG")) and ".128" in opcode else "other"


def executed(opcodes: Counter[str]) -> Count:
    parts: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        parts[_part(opcode)] += number
    return Count(sum(opcodes.values()), *(parts[name] for name in Count._fields[1:]))


def count_of(loop: Loop, units: int) -> Count:
    """What an iteration executes that moves so many units; loops inside it move equal parts of what is not its own."""
    own = executed(loop.executed)
    rest = units - own.units
    if rest < 0 or bool(rest) != bool(loop.inside) or any(child.inside for child in loop.inside):
        raise ValueError(f"an iteration moves {own.units:.0f} units and has {len(loop.inside)} loops; expected {units}")
    for child in loop.inside:
        count = executed(child.executed)
        own = own.plus(count, rest / len(loop.inside) / count.units)
    return own


def count_of_term(loop: Loop, units: int) -> Count:
    """What the loops inside an iteration execute for one term, of so many units."""
    total = Count(*(0 for _ in Count._fields))
    for child in loop.inside:
        count = executed(child.executed)
        total = total.plus(count, units / count.units)
    return total


def blocks_at_once(function: Function, architecture: Architecture) -> int:
    """Blocks that a multiprocessor holds at the same time."""
    registers = -(-function.registers // 8) * 8 * THREADS
    shared = function.shared_bytes + (1 << 10)  # of the system
    return min(65536 // registers, architecture.threads // THREADS, architecture.shared_bytes // shared)
