"""The tables of ``python -m benchmarks.gpu``."""

from typing import Any

COLUMNS = {  # key of a row -> head of its column, and how it is written
    "ms": ("ms", lambda row: f"{row['ms']:.3f}"),
    "ms_p20": ("20th to 80th percentile", lambda row: f"{row['ms_p20']:.3f} to {row['ms_p80']:.3f}"),
    "host_us": ("host, µs", lambda row: f"{row['host_us']:.0f}"),
    "gb_per_s": ("GB/s", lambda row: f"{row['gb_per_s']:.0f}"),
    "share_of_copy": ("of copy", lambda row: f"{100 * row['share_of_copy']:.0f} %"),
    "times_adamw": ("× AdamW(fused=True)", lambda row: f"{row['times_adamw']:.2f}"),
    "times_plain": ("× plain", lambda row: f"{row['times_plain']:.2f}"),
    "peak_mib": ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
}
TIMED = ("roofline", "adamw", "layouts", "launches", "training_step", "sample_gradients_speed", "compiled_peers")


def markdown(record: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [f"# GPU: correctness and speed\n\n`{record['command']}`, {facts}.\n"]
    if record["missing"]:
        without = "; ".join(f"{name}: {what}" for name, what in record["missing"].items())
        lines.append(f"Not installed, and what did not run without it: {without}.\n")
    lines += ["| backend | stage | status | | seconds |", "|---|---|---|---|---|"]
    for key, stage in record["stages"].items():
        backend, _, name = key.partition(": ")
        note = stage.get("reason") or counts(stage.get("result", {}))
        lines.append(f"| {backend} | {name} | {stage['status']} | {note} | {stage.get('seconds', '')} |")
    for key, stage in record["stages"].items():
        name, result = key.partition(": ")[2], stage.get("result", {})
        for title, part in result.items() if name in (*TIMED, "trainers") else ():
            lines += ["", f"## {key}, {title}", "", *(trainers(part) if name == "trainers" else table(part))]
    return "\n".join(lines) + "\n"


def counts(result: dict[str, Any]) -> str:
    """Of a stage that runs tests."""
    if "collected" not in result:
        return ""
    return ", ".join(f"{result[key]} {key}" for key in ("collected", "passed", "failed", "skipped") if result[key])


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    lines = ["| | " + " | ".join(COLUMNS[c][0] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [COLUMNS[c][1](row) if c in row else "" for c in columns]
        lines.append(f"| {name} | {row['skipped'] if 'skipped' in row else ' | '.join(cells)} |")
    return lines


def trainers(part: dict[str, Any]) -> list[str]:
    if "skipped" in part:
        return [part["skipped"]]
    from ..trainers import table

    return table(part)
