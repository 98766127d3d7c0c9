"""Tables of ``python -m benchmarks.penalty``, and the rows of them that the README quotes."""

from collections.abc import Sequence
from typing import Any

from ..common.problem import TASKS
from .contenders import CONTENDERS
from .operators import OPERATORS
from .rows import LIMIT

# The rows that the README quotes, at this size.
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
            *[with_both_allocators(row, key) for key in ("paper_over_this", "loop_over_this")],
        ]
    return "| " + " | ".join([row["name"], *cells, str(row["bytes_per_parameter"]), str(state)]) + " |"


def with_both_allocators(row: dict[str, Any], key: str) -> str:
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
    """The main rows at one size, or None if they were not all measured."""
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
