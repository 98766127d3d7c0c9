"""Tables of ``python -m benchmarks.sample_gradients``."""

from typing import Any

WRONG = 1e-3  # errors of float32 are about 1e-6; a larger one means that the row computes something else

HEADER = (
    "| | gives | ms | × plain | peak memory, × plain | largest relative error |",
    "|---|---|---|---|---|---|",
)


def table_row(row: dict[str, Any]) -> str:
    if "ms" in row:
        digits = 1 if row["ms"] < 100 else 0
        cells = [
            f"{row['ms']:.{digits}f} [{row['ms_p20']:.{digits}f}, {row['ms_p80']:.{digits}f}]",
            f"{row['times_plain']:.2f} [{row['times_plain_p20']:.2f}, {row['times_plain_p80']:.2f}]",
            f"{row['peak_times_plain']:.2f}" if "peak_times_plain" in row else "",
            error_cell(row["errors"]),
        ]
    else:
        cells = ["fails: " + row["failed"] if "failed" in row else row["skipped"], "", "", ""]
    return "| " + " | ".join([row["name"], ", ".join(row["gives"]), *cells]) + " |"


def error_cell(errors: dict[str, float]) -> str:
    wrong = [f"{name} by {100 * value:.2g} %" for name, value in errors.items() if not value < WRONG]
    return "**wrong**: " + ", ".join(wrong) if wrong else f"{max(errors.values()):.0e}" if errors else ""


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Per-sample gradients of a batch of {result['samples']}",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, 1 thread, process CPU time, torch "
        f"{result['torch']}, {', '.join(f'{name} {number}' for name, number in result['peers'].items())}, "
        f"{result['implementation']} kernels; {result['rounds']} rounds, each row in a process of its own beside the "
        "yardstick, with freed memory kept, median [20th, 80th percentile]. *× plain* is taken round by round.",
        "",
        "*Peak memory* is what the process holds at most during one call beyond what it held before it (activations, "
        "gradients, all results and scratch, inside libraries too; not the model), with an allocator that returns "
        "freed memory at once, over the same of plain forward + backward. *Largest relative error* compares norms, "
        "projections and mean with a loop over the samples, summed in float64; rows that are wrong by more than "
        f"{100 * WRONG:.1g} % compute something else.",
    ]
    for model in result["models"]:
        if "skipped" in model:
            lines += ["", f"## {model['model']}", "", model["skipped"]]
            continue
        lines += ["", f"## {model['model']}, {model['numel']:,} parameters", "", *HEADER]
        lines += map(table_row, model["rows"])
    lines += ["", "## The rows", ""]
    descriptions = {row["name"]: row["what"] for model in result["models"] for row in model["rows"]}
    lines += [f"- {name}: {text}" for name, text in descriptions.items()]
    return "\n".join(lines) + "\n"
