"""The tables of ``python -m benchmarks.gpu``."""

from collections.abc import Iterator
from typing import Any


def markdown(record: dict[str, Any]) -> str:
    from ..trainers import table

    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [
        f"# GPU: correctness and speed\n\n`{record['command']}`, {facts}.\n",
        "| backend | stage | status | |",
        "|---|---|---|---|",
    ]
    for key, stage in record["stages"].items():
        backend, _, name = key.partition(": ")
        lines.append(f"| {backend} | {name} | {stage['status']} | {stage.get('reason', '')} |")
    for key, sizes in results(record, "sample_gradients_speed"):
        for size, rows in sizes.items():
            lines += ["", f"## {key}, {size}", "", "| | ms | × plain | peak MiB |", "|---|---|---|---|"]
            for name, row in rows.items():
                memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
                lines.append(f"| {name} | {row['ms']:.2f} | {row['times_plain']:.2f} | {memory} |")
    for key, result in results(record, "optimizer"):
        numel = result["parameters"]
        lines += ["", f"## {key}, {numel:,} parameters", "", "| | ms | × AdamW(fused=True) |", "|---|---|---|"]
        for name, row in result["times"].items():
            lines.append(f"| {name} | {row['ms']:.3f} | {row['times_adamw']:.2f} |")
    for key, models in results(record, "trainers"):
        for name, part in models.items():
            lines += ["", f"## {key}, {name}", "", *([part["skipped"]] if "skipped" in part else table(part))]
    for key, sizes in results(record, "roofline"):
        for size, rows in sizes.items():
            lines += ["", f"## {key}, {size}", "", "| | ms | GB/s | of copy |", "|---|---|---|---|"]
            for name, row in rows.items():
                cells = (
                    f"{row['ms']:.3f} | {row['gb_per_s']:.0f} | {100 * row['share_of_copy']:.0f} %"
                    if "ms" in row
                    else f"{row['skipped']} | |"
                )
                lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def results(record: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of a stage with each backend that has finished it."""
    for key, stage in record["stages"].items():
        if stage["status"] == "ok" and key.endswith(name):
            yield key, stage["result"]
