"""``python -m benchmarks.penalty``: what a penalty's value and gradient cost, as ratios measured in one run.

Calls are interleaved, one of each per round, and medians are taken, so a drift of the machine's speed meets all of
them. With one thread the clock is process CPU time; with more it is wall time. Freed memory is kept (allocator.py).
Peers that are not installed, and rows that memory does not suffice for, say so in the table: ``pip install
avalanche-lib`` for Avalanche's own plugin.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import crl_kernels
from crl_kernels.backends import registry

from . import allocator
from .contenders import CONTENDERS
from .measure import commit, interleaved, prepare, processor, require_memory, rows_of
from .operators import OPERATORS
from .problem import TASKS, Problem, Unavailable

LIMIT = "dot + axpy, flat"
# What a row is compared with, by its number of past tasks.
PAPER = {1: "rank-1, the paper's way", TASKS: "rank-1, the paper's way, 10 tasks"}
LOOP = {1: "diagonal, Python loop", TASKS: "diagonal, Python loop, 10 tasks"}
# The rows worth a reader's first look, and the size they are taken from.
SUMMARY_SIZE = "25M/100"
SUMMARY = (
    LIMIT,
    "rank-1, add_penalty_grad_",
    "rank-1, add_penalty_grad_, bf16",
    "rank-1, autograd",
    "rank-1, foreach",
    "rank-1, torch.compile",
    "rank-1, the paper's way",
    "rank-1, 10 terms",
    "diagonal, add_penalty_grad_",
    "diagonal, torch.compile",
    "diagonal, Python loop",
    "diagonal, Avalanche's EWCPlugin",
    "diagonal, 10 tasks",
    "diagonal, Avalanche's EWCPlugin, 10 tasks",
)


def parse_size(text: str) -> tuple[int, int]:
    """``25M/100`` -> (25,000,000, 100): parameters and the tensors that hold them."""
    numel, _, tensors = text.partition("/")
    unit = {"K": 1e3, "M": 1e6}.get(numel[-1:], 1)
    return round(float(numel.rstrip("KM")) * unit), int(tensors)


def rounds_for(numel: int) -> int:
    """As many as take about a minute at this size, from 5 to 200."""
    return max(5, min(200, 500_000_000 // numel))


def measure(label: str, threads: int, rounds: int | None) -> dict[str, Any]:
    numel, tensors = parse_size(label)
    contenders = CONTENDERS | OPERATORS
    rounds = rounds or rounds_for(numel)
    size: dict[str, Any] = {"label": label, "numel": numel, "tensors": tensors, "rounds": rounds}
    try:
        require_memory(28 * numel, torch.device("cpu"))
    except Unavailable as reason:
        return size | {"skipped": str(reason), "rows": []}
    calls, reasons = prepare(contenders, Problem(numel, tensors))
    seconds = interleaved(calls, rounds, time.process_time if threads == 1 else time.perf_counter)
    rows = rows_of(contenders, seconds, reasons, numel)
    for name, row in zip(contenders, rows, strict=True):
        ratios = {"times_limit": (row["name"], LIMIT)}
        if name in CONTENDERS and CONTENDERS[name].penalty:
            tasks = CONTENDERS[name].tasks
            ratios |= {"paper_over_this": (PAPER[tasks], name), "loop_over_this": (LOOP[tasks], name)}
        medians = {row["name"]: row["ms"] for row in rows if "ms" in row}
        row |= {key: medians[a] / medians[b] for key, (a, b) in ratios.items() if a in medians and b in medians}
    return size | {"rows": rows}


HEADER = (
    "| | ms | GB/s | of copy | × dot + axpy | paper's way / this | Python loop / this | moved, bytes/parameter | "
    "state, bytes/parameter |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [*HEADER, *map(table_row, rows)]


def table_row(row: dict[str, Any]) -> str:
    state = row["state_bytes_per_parameter"] or ""
    if "skipped" in row:
        cells = [row["skipped"], "", "", "", "", ""]
    else:
        digits = 3 if row["ms"] < 10 else 2 if row["ms"] < 100 else 1
        ms = [f"{row[key]:.{digits}f}" for key in ("ms", "ms_p20", "ms_p80")]
        ratios = [f"{row[key]:.1f}" if key in row else "" for key in ("paper_over_this", "loop_over_this")]
        cells = [
            f"{ms[0]} [{ms[1]}, {ms[2]}]",
            f"{row['gb_per_s']:.1f}",
            f"{100 * row['share_of_copy']:.0f} %",
            f"{row['times_limit']:.2f}",
            *ratios,
        ]
    return "| " + " | ".join([row["name"], *cells, str(row["bytes_per_parameter"]), str(state)]) + " |"


def conditions(result: dict[str, Any]) -> str:
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return (
        f"`{result['command']}`, {result['date']}, {result['machine']}, {threads}, {result['clock']}, "
        f"{result['memory']}, torch {result['torch']}, {result['implementation']} kernels"
    )


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Penalty value + gradient, added to `.grad` of float32 parameters",
        "",
        f"{conditions(result)}; median [20th, 80th percentile] of interleaved rounds.",
        "",
        "GB/s are the bytes that a scheme moves, as counted below, over its time; *of copy* compares them with "
        "`y.copy_(x)` in the same rounds, counted as one read and one write. A processor also fetches the lines that a "
        "copy overwrites, so rows that read more than they write can exceed 100 %, as can rows whose temporaries stay "
        "in a cache. The paper's way and the Python loop are compared with rows of as many past tasks, 1 or "
        f"{TASKS}.",
    ]
    for size in result["sizes"]:
        tensors = "one flat tensor" if size["tensors"] == 1 else f"{size['tensors']} tensors"
        lines += ["", f"## {size['numel']:,} parameters in {tensors}", ""]
        if "skipped" in size:
            lines += [f"Skipped: {size['skipped']}."]
            continue
        penalties = [row for row in size["rows"] if row["name"] in CONTENDERS]
        operators = [row for row in size["rows"] if row["name"] in OPERATORS]
        lines += [f"{size['rounds']} rounds.", "", *table(penalties), "", "Operators alone:", "", *table(operators)]
    lines += ["", "## What is counted, bytes per parameter", ""]
    lines += [f"- {name}: {row.counted}. {row.what}." for name, row in CONTENDERS.items()]
    lines += [f"- {name}: {row.counted}." for name, row in OPERATORS.items()]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str | None:
    """The rows worth a first look, at one size, for the README to quote."""
    size = next((size for size in result["sizes"] if size["label"] == SUMMARY_SIZE), None)
    if size is None or "skipped" in size:
        return None
    rows = {row["name"]: row for row in size["rows"]}
    lines = [
        f"# Penalty value + gradient, {size['numel']:,} float32 parameters in {size['tensors']} tensors: the main rows",
        "",
        f"{conditions(result)}; median [20th, 80th percentile] of {size['rounds']} interleaved rounds.",
        "",
        *table([rows[name] for name in SUMMARY]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["0.6M/100", "25M/100", "25M/1", "350M/700"],
        metavar="PARAMETERS/TENSORS",
        help="(default: 0.6M/100 25M/100 25M/1 350M/700)",
    )
    parser.add_argument("--rounds", type=int, help="rounds (default: from 200 for small sizes to 5 for large ones)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--system-memory", action="store_true", help="do not keep freed memory; see allocator.py")
    parser.add_argument(
        "--out", type=Path, help="folder for penalty_*.json, *.md and the picture (default: print only)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    system = arguments.system_memory or not allocator.keep_freed_memory()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.penalty", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": processor(),
        "threads": arguments.threads,
        "clock": "process CPU time" if arguments.threads == 1 else "wall time",
        "memory": "the system's allocator" if system else "freed memory kept by the process",
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "implementation": registry.implementation("cpu"),
        "sizes": [],
    }
    for label in arguments.sizes:
        size = measure(label, arguments.threads, arguments.rounds)
        allocator.return_freed_memory()
        result["sizes"].append(size)
        print(f"{label}: {size.get('skipped', 'measured')}", file=sys.stderr, flush=True)
    text = markdown(result)
    print(text)
    if arguments.out:
        write(result, text, arguments.out)


def write(result: dict[str, Any], text: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"penalty_cpu_{result['threads']}thread"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(text)
    if short := summary(result):
        (folder / f"{stem}_summary.md").write_text(short)
    if measured := [size for size in result["sizes"] if size["rows"]]:
        from .roofline import draw

        draw(
            conditions(result | {"command": "Achieved bandwidth"}).replace("`", ""),
            measured,
            folder / f"roofline_cpu_{result['threads']}thread.png",
        )


if __name__ == "__main__":
    main()
