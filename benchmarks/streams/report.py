"""The page and the picture of a record. Numbers of a stream are medians over neighbouring K and over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import cost, forms

WINDOW = 0.8  # a number at K is the median over WINDOW K < K' <= K
DEFINITIONS = """\
A number at K is the median over 0.8 K to K tasks and over seeds; in brackets the smallest and the largest median of a
seed. Gradient error: |g − g_exact| / |g_exact|, which is 1 for a penalty of zero. Best multiple: the factor of the
diagonal with which its gradient would come closest to what merging left out: 1 if it is right, 0 if it says nothing.
"""


def names_of_streams(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(part["stream"] for part in record["streams"]))


def bounded(record: dict[str, Any]) -> list[str]:
    limits = record["limits"]
    return [*map(forms.merged, limits), *map(forms.with_tail, limits), forms.DIAGONAL]


def marks(record: dict[str, Any]) -> list[int]:
    count = record["tasks"]
    return sorted({max(1, count // 10), count // 4, count // 2, count - 1})


def by_seed(record: dict[str, Any], stream: str, form: str, key: str, tasks: int) -> list[float]:
    """The median over a window of K, for each seed that has such numbers."""
    medians = []
    for part in record["streams"]:
        if part["stream"] == stream:
            rows = [row["forms"][form] for row in part["rows"] if WINDOW * tasks < row["tasks"] <= tasks]
            if values := [row[key] for row in rows if key in row]:
                medians.append(statistics.median(values))
    return medians


def cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    middle, low, high = (f"{x:.3g}".replace("-", "−") for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]" if len(values) > 1 else middle


def cost_rows(record: dict[str, Any]) -> Iterator[str]:
    yield "| tasks | form | bytes / parameter | value and gradient | step of FusedAdamW | append |"
    yield "|--:|---|--:|---|---|--:|"
    for row in record["costs"]:
        times = (
            f"{row[what]['ratio']:.2f} [{row[what]['ratio_p20']:.2f}, {row[what]['ratio_p80']:.2f}]"
            for what in ("gradient", "step")
        )
        yield (
            f"| {row['tasks']} | {row['form']} | {row['bytes_per_parameter']:.0f} | {' | '.join(times)} "
            f"| {row['append']['ratio']:.0f} |"
        )


def stream_rows(record: dict[str, Any], stream: str) -> Iterator[str]:
    shown = marks(record)
    last = shown[-1]
    head = [f"gradient error, K = {tasks}" for tasks in shown]
    head += [f"{what}, K = {last}" for what in ("cosine", "value / exact", "best multiple")]
    yield f"| form | {' | '.join(head)} |"
    yield "|---|" + "---|" * len(head)
    for form in bounded(record):
        cells = [cell(by_seed(record, stream, form, "gradient", tasks)) for tasks in shown]
        cells += [cell(by_seed(record, stream, form, key, last)) for key in ("cosine", "value", "best_multiple")]
        yield f"| {form} | {' | '.join(cells)} |"


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Long streams of tasks\n",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}, one thread, process "
        f"CPU time, torch {record['torch']}, {record['kernels']} kernels.\n",
        "![Error and cost of each form as tasks accumulate](streams.png)\n",
        "## Cost\n",
        f"{record['parameters']:,} float32 parameters in {record['tensors']} tensors. Times are divided by that of a "
        f"step of torch's {cost.ADAMW} in the same round: median [20th, 80th percentile] of {record['rounds']} rounds, "
        f"and one round for append. The step of `{forms.with_tail(cost.LIMIT)}` has its penalty attached, the others "
        "inside. "
        "What fits the processor's caches is quicker than its share of the bytes.\n",
        *cost_rows(record),
        "\n## Error\n",
        "Tasks are scikit-learn's digits with pixels permuted, labels permuted, or rotated. Steps of Adam per task: "
        f"{record['steps']}. Seeds: {record['seeds']}.\n",
        DEFINITIONS,
    ]
    for stream in names_of_streams(record):
        lines += [f"### {stream[0].upper()}{stream[1:]}\n", *stream_rows(record, stream), ""]
    return "\n".join(lines).rstrip() + "\n"


def picture(record: dict[str, Any], folder: Path | None) -> None:
    """FOLDER/streams.png; nothing without a folder."""
    if folder is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    panels = list(axes.flat)
    limits = record["limits"]
    colours = dict(zip(limits, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    styles = {forms.merged(n): (colours[n], "-") for n in limits}
    styles |= {forms.with_tail(n): (colours[n], "--") for n in limits} | {forms.DIAGONAL: ("#000000", ":")}
    for axis, stream in zip(panels, names_of_streams(record), strict=False):
        for form, (colour, style) in styles.items():
            counts = sorted({row["tasks"] for part in record["streams"] for row in part["rows"]})
            values = [(k, by_seed(record, stream, form, "gradient", k)) for k in counts]
            points = [(k, statistics.median(v)) for k, v in values if v and statistics.median(v) > 1e-4]
            axis.plot(*zip(*points, strict=True) if points else ([], []), style, color=colour, label=form)
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tasks K",
            ylabel="relative gradient error",
            title=stream,
            ylim=(0.01, 3),
        )
    for axis, (what, label) in zip(
        panels[-2:],
        (("bytes", "bytes per parameter"), ("gradient", "value and gradient, in steps of AdamW")),
        strict=True,
    ):
        for form in dict.fromkeys(row["form"] for row in record["costs"]):
            rows = [row for row in record["costs"] if row["form"] == form]
            values = [row["bytes_per_parameter"] if what == "bytes" else row["gradient"]["ratio"] for row in rows]
            axis.plot([row["tasks"] for row in rows], values, "o-", label=form)
        axis.set(xscale="log", yscale="log", xlabel="tasks K", ylabel=label, title=label)
        axis.legend(fontsize=8)
    panels[0].legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "streams.png.tmp"
    figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    unfinished.replace(folder / "streams.png")
