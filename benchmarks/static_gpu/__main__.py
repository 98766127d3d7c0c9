"""``python -m benchmarks.static_gpu``: would arithmetic or memory limit each CUDA kernel, on each kind of GPU?

Compiles csrc/cuda for each architecture and counts, in the machine code, what a thread executes for eight elements.
From published rates follows the time that a multiprocessor's busiest part would take, as a share of the time that the
kernel's bytes take at the card's bandwidth: below 1, memory is the limit. Nothing runs on a GPU, and nothing here is a
measurement. Latency is left out; for it, the table has the bytes that all threads of a multiprocessor request before
they wait, beside those that have to be under way at any time to use the full bandwidth (Little's law).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ..common import command
from . import prediction
from .machine_code import CSRC, Function, Loop, compiled, hot_loops, nvcc
from .prediction import (
    ARCHITECTURES,
    CARDS,
    NARROWER,
    OCTET,
    THREADS,
    UNIT,
    Architecture,
    Count,
    count_of,
    count_of_term,
)

HERE = Path(__file__).parent


class Kernel(NamedTuple):
    """A kernel that streams: ``read`` and ``written`` float32 tensors of the parameters' size, and its terms."""

    name: str
    read: int
    written: int
    label: str
    template: str = ""  # in the mangled name, but for how it reads its terms
    fixed: str = ""  # the kernel of fixed_terms.cu, where it has terms
    readings: int = 1  # of each term's octet; a second one finds it in L1 or L2


KERNELS = (
    Kernel("projections_kernel", 1, 0, "projections", "If", "projections_of"),
    Kernel("combine_kernel", 1, 1, "gradient added", "IfLb0", "combine_of"),
    Kernel("low_rank_adamw_kernel", 4, 3, "AdamW, low rank", "IfLb0ELb0", "adamw_of", 2),
    Kernel("quadratic_kernel", 3, 0, "diagonal, value", "If"),
    Kernel("quadratic_gradient_kernel", 4, 1, "diagonal, value and gradient added", "IfLb0"),
    Kernel("shrink_kernel", 3, 1, "diagonal, decoupled", "If"),
    Kernel("diagonal_adamw_kernel", 6, 3, "AdamW, diagonal", "IfLb0ELb0"),
    Kernel("diagonal_adamw_kernel", 6, 3, "AdamW, diagonal, decoupled", "IfLb1ELb0"),
)


class Terms(NamedTuple):
    number: int
    bytes: int  # of an element


TERMS = (Terms(1, 4), Terms(10, 2), Terms(1, 1), Terms(10, 1))  # of 1 byte: int8, in blocks of whole octets
VIEW, INT8_VIEW = "NS_4ViewE", "NS_8Int8ViewE"  # in mangled names
INT8_TERMS_AT_ONCE = 4  # that a thread requests before it waits: Terms<Widest, Int8View> in csrc/cuda/directions.cuh
MANY = 30  # terms, in fixed_terms.cu, for which the compiler keeps its loop over terms


def named(functions: list[Function], name: str, template: str) -> Function:
    """The one whose mangled name has this name, with its length in front, and these template arguments."""
    (match,) = [f for f in functions if f"{len(name)}{name}{template}E" in f.name]
    return match


class Way(NamedTuple):
    """What a thread executes for an octet, and the bytes that it requests before it waits for any: of terms in int8, as
    many as the source says."""

    executed: Count
    bytes_requested: float


def way(
    kernel: Kernel, shipped: list[Function], fixed: list[Function], architecture: Architecture, terms: Terms | None
) -> Way:
    stream = OCTET * 4 // UNIT

    def first_loop(function: Function) -> Loop:
        return hot_loops(function, architecture.product)[0]

    units = (kernel.read + kernel.written) * stream
    if terms is None:
        loop = first_loop(named(shipped, kernel.name, kernel.template))
        return Way(count_of(loop, units), loop.requested * UNIT)
    if terms.bytes == 1:

        def of(number: int) -> Count:
            return count_of(first_loop(named(fixed, kernel.fixed, f"ILi{number}E{INT8_VIEW}")), units)

        count = of(1)
        if terms.number > 1:
            per_term = of(4).plus(of(2), -1)
            count = of(4).plus(per_term, (terms.number - 4) / 2)
        octets = min(terms.number, INT8_TERMS_AT_ONCE)
        return Way(count, kernel.read * stream * UNIT + octets * OCTET)
    loop = first_loop(named(fixed, kernel.fixed, f"ILi1E{VIEW}"))
    count = count_of(loop, units + kernel.readings * stream)
    if terms.number > 1:
        loop = first_loop(named(fixed, kernel.fixed, f"ILi{MANY}E{VIEW}"))
        count = count.plus(count_of_term(loop, stream), terms.number - 1)
    if terms.bytes == 2:
        count = count.plus(NARROWER, terms.number * kernel.readings)
    streams = kernel.read * stream
    return Way(count, (streams + (loop.requested - streams) * terms.bytes / 4) * UNIT)


def terms_of(kernel: Kernel) -> tuple[Terms | None, ...]:
    """What is counted of a kernel. The second reading of many terms in int8 is in a loop that moves no whole unit."""
    if not kernel.fixed:
        return (None,)
    return tuple(t for t in TERMS if kernel.readings == 1 or t.number == 1 or t.bytes > 1)


def row(kernel: Kernel, shipped: list[Function], fixed: list[Function], architecture: str, terms: Terms | None) -> Any:
    count, requested = way(kernel, shipped, fixed, ARCHITECTURES[architecture], terms)
    view = "" if terms is None else INT8_VIEW if terms.bytes == 1 else VIEW
    end = "E" if "L" in kernel.template and view else ""  # of a template argument that is a value
    function = named(shipped, kernel.name, kernel.template + end + view)
    blocks = prediction.blocks_at_once(function, ARCHITECTURES[architecture])
    of_terms = terms.number * terms.bytes if terms else 0
    bytes_moved = OCTET * ((kernel.read + kernel.written) * 4 + of_terms)
    cards = {}
    for name, card in CARDS.items():
        if card.architecture == architecture:
            memory = bytes_moved / card.bytes_per_cycle
            wanted = card.bytes_per_cycle * card.clock * prediction.LATENCY
            cards[name] = {
                "share_of_memory_time": round(count.cycles(ARCHITECTURES[architecture]) / memory, 2),
                "kib_wanted": round(wanted / 1024, 1),
            }
    return {
        "kernel": kernel.label,
        "terms": f"{terms.number} of {8 * terms.bytes} bits" if terms else "–",
        "bytes": bytes_moved,
        "count": {name: round(value, 1) for name, value in count._asdict().items()},
        "registers": function.registers,
        "spilled_bytes": function.spilled_bytes,
        "blocks": blocks,
        "kib_requested": round(blocks * THREADS * requested / 1024, 1),
        "cards": cards,
    }


def compile_for(architecture: str, folder: Path) -> tuple[list[Function], list[Function]]:
    """The kernels that are shipped, and those for a fixed number of terms."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    shipped = [function for source in sources for function in compiled(source, architecture, folder)]
    return shipped, compiled(HERE / "fixed_terms.cu", architecture, folder)


def table(architecture: str, shipped: list[Function], fixed: list[Function]) -> list[Any]:
    """Every kernel's row for an architecture."""
    return [row(kernel, shipped, fixed, architecture, terms) for kernel in KERNELS for terms in terms_of(kernel)]


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# What the CUDA kernels ask of a GPU, by count",
        "",
        f"`{record['command']}`, {record['date']}, {record['compiler']}. Counted in machine code; not run on a GPU.",
        "",
        "For each octet, eight elements of one thread: bytes moved; instructions in all, and of float32, of float64 "
        "and of conversions from and to it. For each multiprocessor: blocks of 256 threads, and the KiB they request "
        "before they wait. For each card: the time of the busiest part, as a share of the time of the bytes at the "
        "card's bandwidth (below 1, memory is the limit), and the KiB that have to be under way to use all of it.",
    ]
    for architecture, rows in record["architectures"].items():
        names = list(rows[0]["cards"])
        lines += [
            "",
            f"## sm_{architecture}",
            "",
            "| kernel | terms | bytes | instructions | float32 | float64 | conversions | registers | blocks | KiB | "
            + " | ".join(f"{name}, {rows[0]['cards'][name]['kib_wanted']} KiB" for name in names)
            + " |",
            "|---|---|" + "--:|" * (8 + len(names)),
        ]
        for r in rows:
            count = r["count"]
            cells = [r["kernel"], r["terms"], r["bytes"]]
            cells += [f"{count[name]:.0f}" for name in ("instructions", "float32", "float64", "conversions")]
            cells += [r["registers"], r["blocks"], r["kib_requested"]]
            cells += [f"{card['share_of_memory_time']:.2f}" for card in r["cards"].values()]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command.parser("static_gpu", __doc__, "static_gpu.json and static_gpu.md")
    parser.add_argument(
        "--architectures", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES), help="(default: all)"
    )
    arguments = parser.parse_args()
    if nvcc() is None:
        parser.error("needs nvcc, on PATH or in $CUDA_HOME/bin")
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", version)
    record: dict[str, Any] = {
        **command.record_head("static_gpu"),
        "compiler": f"nvcc {release[1] if release else version}",
        "architectures": {},
    }
    for architecture in arguments.architectures:
        with tempfile.TemporaryDirectory() as folder:
            shipped, fixed = compile_for(architecture, Path(folder))
        record["architectures"][architecture] = table(architecture, shipped, fixed)
        command.write(arguments.out, "static_gpu", record, markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
