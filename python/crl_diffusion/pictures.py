"""Pictures of one run, drawn from its folder: samples, the matrix R, curves; and what all pictures share.

Nothing here trains, samples or measures.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # pictures go to files, with or without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from crl_diffusion.readers import read_config, read_metrics, read_samples
from crl_diffusion.records import Row
from crl_diffusion.report import fid_matrix

# Okabe and Ito's palette, which colour-blind readers can tell apart, and markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")  # lines of methods that do equally well lie on one another
GREY = "#888888"
DPI = 150
SAMPLE_ROWS, SAMPLE_COLUMNS, ACROSS = 2, 6, 30  # images of a class, at most, and of all classes side by side
SHOWN_CLASSES = 20  # columns that a page's width has room for
SHOWN_NUMBERS = 8  # tasks up to which a matrix has room for its numbers


class Drawing(NamedTuple):
    """A picture as PNG, what it shows for those who do not see it, and its caption; with a name, it has a file too."""

    name: str
    png: bytes
    alt: str
    caption: str

    def save(self, folder: Path) -> Path:
        """Written beside the final name, then renamed."""
        path = folder / f"{self.name}.png"
        temporary = path.with_suffix(f".{os.getpid()}.tmp.png")
        temporary.write_bytes(self.png)
        os.replace(temporary, path)
        return path


def drawing(name: str, figure: Figure, alt: str, caption: str) -> Drawing:
    buffer = io.BytesIO()
    # Without matplotlib's version in it: the same bits from the same runs.
    figure.savefig(
        buffer, dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None}
    )
    plt.close(figure)
    return Drawing(name, buffer.getvalue(), alt, caption)


def wrap(method: str, width: int) -> str:
    """A method's name in lines of about `width` characters, broken after + : and commas."""
    parts = re.sub(r"([+:,])(?=.)", r"\1 ", method)
    lines = textwrap.wrap(parts, width, break_long_words=True) or [method]
    return "\n".join(re.sub(r"([+:,]) ", r"\1", line) for line in lines)


# Samples


class Classes(NamedTuple):
    """The classes that a picture shows, task by task in the order learnt."""

    tasks: list[list[int]]
    all: int  # classes that there are

    @classmethod
    def learnt(cls, labels: np.ndarray, tasks: int) -> Classes:
        """From the labels of the last evaluation, which come task by task; evenly chosen where there are too many."""
        order = list(dict.fromkeys(labels.tolist()))
        size = max(1, len(order) // tasks)
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        chosen = set(np.linspace(0, len(order) - 1, min(len(order), SHOWN_CLASSES)).round().astype(int).tolist())
        kept = [[c for j, c in enumerate(part) if i * size + j in chosen] for i, part in enumerate(parts)]
        return cls(kept, len(order))

    @property
    def shown(self) -> list[int]:
        return [c for part in self.tasks for c in part]

    @property
    def note(self) -> str:
        few = len(self.shown) < self.all
        return f" {len(self.shown)} of {self.all} classes, evenly chosen." if few else ""


def strip(pixels: np.ndarray, labels: np.ndarray, classes: Classes, rows: int, columns: int) -> np.ndarray:
    """One row of cells, a cell a class with rows x columns images, as floats (H, W, 3) from 0 to 1: white between
    cells, light grey where there is no image."""
    side = pixels.shape[-1]
    gap = max(1, side // 8)
    height, width = rows * (side + gap) - gap, columns * (side + gap) - gap
    cells = []
    for c in classes.shown:
        block = np.full((height, width, 3), 0.91 if not (labels == c).any() else 1.0)
        for i, image in enumerate(pixels[labels == c][: rows * columns]):
            top, left = (i // columns) * (side + gap), (i % columns) * (side + gap)
            colour = np.broadcast_to(np.moveaxis(image, 0, -1), (side, side, 3))  # grey images: one channel, thrice
            block[top : top + side, left : left + side] = colour / 255
        cells += [block, np.ones((height, 3 * gap, 3))]
    return np.concatenate(cells[:-1], axis=1)


def strips_of(
    kept: Sequence[tuple[str, tuple[np.ndarray, np.ndarray]]], classes: Classes
) -> list[tuple[str, np.ndarray]]:
    """Labelled rows of cells, with as many images of a class as fit the width."""
    columns = min(max(ACROSS // len(classes.shown), 1), SAMPLE_COLUMNS)
    return [(label, strip(*found, classes, SAMPLE_ROWS, columns)) for label, found in kept]


def show_strips(strips: Sequence[tuple[str, np.ndarray]], classes: Classes, title: str) -> Figure:
    """Rows of cells under one another, each with its label on the left; columns are headed by their class."""
    height, width, _ = strips[0][1].shape
    labels = [wrap(label, 26) for label, _ in strips]
    inches, left = 10.0, 0.15 + 0.08 * max(len(line) for label in labels for line in label.split("\n"))
    lines = max(label.count("\n") + 1 for label in labels)
    row = max((inches - left - 0.15) * height / width, 0.17 * lines) + 0.1
    head, foot = (0.95 if title else 0.6), 0.1
    total = row * len(strips) + head + foot
    figure, axes = plt.subplots(len(strips), 1, figsize=(inches, total), squeeze=False)
    figure.subplots_adjust(left / inches, foot / total, 1 - 0.15 / inches, 1 - head / total, hspace=0.1 / (row - 0.1))
    for i, (label, (_, image)) in enumerate(zip(labels, strips, strict=True)):
        axis: Axes = axes[i, 0]
        axis.imshow(image, interpolation="nearest", aspect="equal")
        axis.set_yticks([image.shape[0] / 2 - 0.5], [label], fontsize=9)
        axis.tick_params(length=0)
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    top: Axes = axes[0, 0]
    shown = classes.shown
    cell = (width + 1) / len(shown)
    named = "class " if len(shown) <= 10 else ""
    top.set_xticks([cell * (i + 0.5) - 1 for i in range(len(shown))], [f"{named}{c}" for c in shown], fontsize=9)
    top.xaxis.tick_top()
    if len(shown) > 10:
        for text, height, colour in (("class", 5, "black"), ("task", 19, "#555555")):
            where = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "fontsize": 9}
            top.annotate(text, (0.0, 1.0), xytext=(-6, height), color=colour, **where)
    first = 0
    for number, part in enumerate(classes.tasks, start=1):
        if part:
            top.annotate(
                f"task {number}" if len(shown) <= 10 else str(number),
                ((first + len(part) / 2) * cell - 1, 1.0),
                xytext=(0, 19),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color="#555555",
            )
        first += len(part)
    if title:
        figure.suptitle(title, y=1 - 0.12 / total, va="top", fontsize=13)
    return figure


def grid_over_tasks(run: Path, tasks: int, title: str = "") -> tuple[Figure, Classes] | None:
    """Samples after each task, a row each; None where the run keeps none."""
    kept = {i: found for i in range(1, tasks + 1) if (found := read_samples(run, i)) is not None}
    if not kept:
        return None
    classes = Classes.learnt(kept[max(kept)][1], tasks)
    strips = strips_of([(f"after task {i}", found) for i, found in kept.items()], classes)
    return show_strips(strips, classes, title), classes


# R and curves


def heatmap(axis: Axes, r: Sequence[Sequence[float]], limits: tuple[float, float], size: float = 9) -> Any:
    tasks = len(r)
    table = np.full((tasks, tasks), np.nan)
    for i, row in enumerate(r):
        table[i, : len(row)] = row
    norm = LogNorm(*limits)
    image = axis.imshow(table, cmap="cividis_r", norm=norm)
    for i, j in zip(*np.nonzero(np.isfinite(table)), strict=True):
        if tasks <= SHOWN_NUMBERS:
            colour = "white" if norm(table[i, j]) > 0.5 else "black"
            axis.text(j, i, f"{table[i, j]:.3g}", ha="center", va="center", color=colour, fontsize=size)
    shown = range(0, tasks, 1 if tasks <= 10 else 2)
    axis.set_xticks(shown, [str(j + 1) for j in shown])
    axis.set_yticks(shown, [str(i + 1) for i in shown])
    return image


def plain_log(axis: Any) -> None:
    """A logarithmic y axis with ticks that read 1, 2, 5, 10, 20, ... or, over a short range, evenly spaced ones."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(MaxNLocator(6) if high < 4 * low else LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, image: Any, axes: Any, rows: int = 1) -> None:
    """As tall as about one of `rows` rows of panels, at the top."""
    low, high = image.norm.vmin, image.norm.vmax
    marks = [m * 10.0**power for power in range(-3, 7) for m in (1, 2, 3, 5, 7) if low <= m * 10.0**power <= high]
    if high < 4 * low:
        marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low <= mark <= high]
    bar = figure.colorbar(
        image, ax=axes, label="FID (lower is better, log scale)", shrink=0.9 / rows, anchor=(0.0, 1.0)
    )
    bar.set_ticks(marks, labels=[f"{mark:g}" for mark in marks])
    bar.set_ticks([], minor=True)


def limits(matrices: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Ends of a logarithmic scale for all values of several matrices."""
    found = [max(value, 1e-3) for r in matrices for row in r for value in row]
    return min(found) / 1.1, max(found) * 1.1


def task_lines(axis: Axes, r: Sequence[Sequence[float]]) -> None:
    """FID of each task after each task, a line a task: a few in colours, many from dark to light as learnt."""
    tasks = len(r)
    for j in range(tasks):
        after = [i for i in range(tasks) if len(r[i]) > j]
        few = tasks <= len(COLOURS)
        axis.plot(
            [i + 1 for i in after],
            [r[i][j] for i in after],
            color=COLOURS[j] if few else plt.get_cmap("cividis")(j / tasks),
            marker=MARKERS[j] if few else "",
            markersize=5,
            linewidth=1.5 if few else 1.1,
            label=f"task {j + 1}",
        )
    axis.set_xticks(range(1, tasks + 1, 1 if tasks <= 10 else 3))


def of_run(run: Path) -> list[Path]:
    """Samples, R and curves of one run."""
    config, rows = read_config(run)["run"], read_metrics(run)
    name = f"{config['method']} on {config['data']}, seed {config['seed']}"
    r = fid_matrix(rows)
    drawings = []
    if (grid := grid_over_tasks(run, len(r), f"Samples of {name}")) is not None:
        drawings.append(drawing("samples", grid[0], "", ""))
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    colour_bar(figure, heatmap(axis, r, limits([r])), axis)
    axis.set(xlabel="FID of task", ylabel="after learning task")
    axis.set_title(wrap(name, 50), fontsize=10)
    drawings += [drawing("fid_matrix", figure, "", ""), drawing("curves", _curves(rows, r, name), "", "")]
    return [each.save(run) for each in drawings]


def _curves(rows: Sequence[Row], r: Sequence[Sequence[float]], name: str) -> Figure:
    """Left: losses over all steps. Right: FID of each task after each task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [row for row in rows if row["kind"] == "step"]
    offset, start, x = 0, [0], []
    for before, row in zip([None, *steps], steps, strict=False):
        if before is not None and row["stage"] != before["stage"]:
            offset += before["step"]
            start.append(offset)
        x.append(offset + row["step"])
    left.plot(x, [row["loss"] for row in steps], color=COLOURS[0], label="real images")
    if any(row["replay_loss"] for row in steps):
        replayed = [row["replay_loss"] or float("nan") for row in steps]
        left.plot(x, replayed, color=COLOURS[1], linestyle="--", label="replayed images, weighted")
    for boundary in start[1:]:
        left.axvline(boundary, color=GREY, linewidth=0.8, linestyle=":")
    plain_log(left)
    left.set_xlabel("optimization step (dotted: a new task begins)")
    left.set_ylabel("loss, mean squared error per pixel")
    left.set_title("Training loss", fontsize=11)
    left.legend(frameon=False)
    task_lines(right, r)
    right.set_ylim(bottom=0)
    right.set(xlabel="after learning task", ylabel="FID (lower is better)")
    right.set_title("FID of each task", fontsize=11)
    many = len(r) > 10
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=2 if many else 1)
    figure.suptitle(name, fontsize=13)
    return figure
