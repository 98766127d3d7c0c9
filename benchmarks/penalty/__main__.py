"""``python -m benchmarks.penalty``: what a penalty's value and gradient cost, as ratios measured in one run.

Each row is measured in a process of its own, where calls of it and of the yardsticks (a copy, the memory limit, one
multi-tensor addition) take turns; medians are taken, and ratios within that process, so a drift of the machine's speed
meets both sides alike, and no row sees what another has left in the allocator. All is measured twice: with the system's
allocator, and with freed memory kept (allocator.py). With one thread the clock is process CPU time; with more it is
wall time. Peers that are not installed, and rows that memory does not suffice for, say so in the table: ``pip install
avalanche-lib`` for Avalanche's own plugin.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import crl_kernels
from crl_kernels.backends import registry

from .contenders import CONTENDERS, YARDSTICKS
from .measure import beside_yardsticks, commit, percentiles, processor, row_of
from .operators import OPERATORS
from .problem import TASKS, Unavailable

ROOT = Path(__file__).parent.parent
COPY, LIMIT, ADDITION = "copy", "dot + axpy, flat", "one torch._foreach_add_"
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
    return max(5, min(200, 375_000_000 // numel))


def measure_row(name: str, label: str, rounds: int | None) -> dict[str, Any]:
    """In this process: what ``measure`` reads from each of its own."""
    numel, tensors = parse_size(label)
    try:
        contender = (CONTENDERS | OPERATORS)[name]
        return {"seconds": beside_yardsticks(name, contender, numel, tensors, rounds or rounds_for(numel))}
    except Unavailable as reason:
        return {"skipped": str(reason)}


def in_its_own_process(name: str, label: str, threads: int, rounds: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.penalty", "--row", name, "--sizes", label, "--threads", str(threads)]
    command += ["--rounds", str(rounds)] if rounds else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return told


def measure(label: str, threads: int, rounds: int | None, only: Sequence[str]) -> dict[str, Any]:
    """All rows of one size; or the yardsticks and the rows whose names contain one of the words ``only``."""
    numel, tensors = parse_size(label)
    rows = []
    for name, contender in (CONTENDERS | OPERATORS).items():
        if only and name not in YARDSTICKS and not any(word in name for word in only):
            continue
        told = in_its_own_process(name, label, threads, rounds)
        row: dict[str, Any] = row_of(name, contender)
        if "skipped" in told:
            row["skipped"] = told["skipped"]
        else:
            # With the system's allocator, and, where the C library can do that, with freed memory kept.
            for seconds, kept in zip(told["seconds"], ("", "_kept"), strict=False):
                row |= {key + kept: value for key, value in percentiles(seconds[name]).items()}
                median = {call: statistics.median(times) for call, times in seconds.items()}
                row["times_limit" + kept] = median[name] / median[LIMIT]
                row["times_addition" + kept] = median[name] / median[ADDITION]
                bandwidth = CONTENDERS[COPY].bytes / median[COPY]
                row["share_of_copy" + kept] = contender.bytes / median[name] / bandwidth
                row["gb_per_s" + kept] = contender.bytes * numel / median[name] / 1e9
        rows.append(row)
        print(f"{label}: {name}: {row.get('skipped', 'measured')}", file=sys.stderr, flush=True)
    compare(rows)
    return {"label": label, "numel": numel, "tensors": tensors, "rounds": rounds or rounds_for(numel), "rows": rows}


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds how many times longer peers take, each measured against the memory limit in its own process."""
    by_name = {row["name"]: row for row in rows}
    for name, row in by_name.items():
        if name not in CONTENDERS or not CONTENDERS[name].penalty:
            continue
        for key, peers in (("paper_over_this", PAPER), ("loop_over_this", LOOP)):
            peer = by_name.get(peers[CONTENDERS[name].tasks], {})
            for kept in ("", "_kept"):
                if f"times_limit{kept}" in row and f"times_limit{kept}" in peer:
                    row[key + kept] = peer[f"times_limit{kept}"] / row[f"times_limit{kept}"]


HEADER = (
    "| | ms | ms, memory kept | GB/s | of copy | × dot + axpy | × foreach_add_ | paper's way / this | "
    "Python loop / this | moved, bytes/parameter | state, bytes/parameter |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [*HEADER, *map(table_row, rows)]


def table_row(row: dict[str, Any]) -> str:
    state = row["state_bytes_per_parameter"] or ""
    if "skipped" in row:
        cells = [row["skipped"], *[""] * 7]
    else:
        digits = 3 if row["ms"] < 10 else 2 if row["ms"] < 100 else 1
        best = "_kept" if "ms_kept" in row else ""
        cells = [
            f"{row['ms']:.{digits}f} [{row['ms_p20']:.{digits}f}, {row['ms_p80']:.{digits}f}]",
            f"{row['ms' + best]:.{digits}f}" if best else "",
            f"{row['gb_per_s' + best]:.1f}",
            f"{100 * row['share_of_copy' + best]:.0f} %",
            f"{row['times_limit' + best]:.2f}",
            f"{row['times_addition' + best]:.2f}",
            *[both(row, key) for key in ("paper_over_this", "loop_over_this")],
        ]
    return "| " + " | ".join([row["name"], *cells, str(row["bytes_per_parameter"]), str(state)]) + " |"


def both(row: dict[str, Any], key: str) -> str:
    """``14.4 (3.6)``: with the system's allocator, and with freed memory kept."""
    kept = f" ({row[key + '_kept']:.1f})" if key + "_kept" in row else ""
    return f"{row[key]:.1f}{kept}" if key in row else ""


def conditions(result: dict[str, Any]) -> str:
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return (
        f"`{result['command']}`, {result['date']}, {result['machine']}, {threads}, {result['clock']}, "
        f"torch {result['torch']}, {result['implementation']} kernels"
    )


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Penalty value + gradient, added to `.grad` of float32 parameters",
        "",
        f"{conditions(result)}; median [20th, 80th percentile] of rounds, each row in a process of its own beside the "
        "yardsticks.",
        "",
        "The first time is with the system's allocator, which takes large temporaries back at every call; the second, "
        "and all columns up to *× foreach_add_*, with freed memory kept, every row at its best. Peers over this row: "
        "both, the second in brackets, with as many past tasks as the row has, 1 or "
        f"{TASKS}. GB/s are the bytes that a scheme moves, as counted below, over its time; *of copy* compares them "
        "with `y.copy_(x)` beside it, counted as one read and one write. A processor also fetches the lines that a "
        "copy overwrites, so rows that read more than they write can exceed 100 %, as can rows whose temporaries stay "
        "in a cache.",
    ]
    for size in result["sizes"]:
        tensors = "one flat tensor" if size["tensors"] == 1 else f"{size['tensors']} tensors"
        penalties = [row for row in size["rows"] if row["name"] in CONTENDERS]
        operators = [row for row in size["rows"] if row["name"] in OPERATORS]
        lines += ["", f"## {size['numel']:,} parameters in {tensors}, {size['rounds']} rounds", "", *table(penalties)]
        lines += ["", "Operators alone:", "", *table(operators)]
    lines += ["", "## What is counted, bytes per parameter", ""]
    counted = {row["name"]: row for size in result["sizes"] for row in size["rows"]}
    lines += [f"- {name}: {row['counted']}. {row['what']}." for name, row in counted.items()]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str | None:
    """The rows worth a first look, at one size, for the README to quote."""
    size = next((size for size in result["sizes"] if size["label"] == SUMMARY_SIZE), None)
    rows = {row["name"]: row for row in size["rows"]} if size else {}
    if size is None or not rows.keys() >= set(SUMMARY):
        return None
    lines = [
        f"# Penalty value + gradient, {size['numel']:,} float32 parameters in {size['tensors']} tensors: the main rows",
        "",
        f"{conditions(result)}; median [20th, 80th percentile] of {size['rounds']} rounds.",
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
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose names contain a word")
    parser.add_argument("--rounds", type=int, help="rounds (default: from 200 for small sizes to 5 for large ones)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument(
        "--out", type=Path, help="folder for penalty_*.json, *.md and the picture (default: print only)"
    )
    parser.add_argument(
        "--row", choices=CONTENDERS | OPERATORS, help="only this row, of one size: its seconds, as JSON"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measure_row(arguments.row, arguments.sizes[0], arguments.rounds)))
        return
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.penalty", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": processor(),
        "threads": arguments.threads,
        "clock": "process CPU time" if arguments.threads == 1 else "wall time",
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "implementation": registry.implementation("cpu"),
        "sizes": [],
    }
    for label in arguments.sizes:
        result["sizes"].append(measure(label, arguments.threads, arguments.rounds, arguments.only))
        if arguments.out:  # after each size, because a large one takes many minutes
            write(result, arguments.out)
    print(markdown(result))


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"penalty_cpu_{result['threads']}thread"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(result))
    if short := summary(result):
        (folder / f"{stem}_summary.md").write_text(short)
    from .roofline import draw

    draw(
        conditions(result | {"command": "Achieved bandwidth"}).replace("`", ""),
        [size for size in result["sizes"] if "ms" in size["rows"][0]],
        folder / f"roofline_cpu_{result['threads']}thread.png",
    )


if __name__ == "__main__":
    main()
