"""Colours, axes and files that all pictures share."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from crl_diffusion.files import replacing
from crl_diffusion.run_folder.class_names import ClassNames, classes_by_task

# Okabe and Ito's palette, which colour-blind readers can tell apart, and markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")  # so that lines of equal values stay visible
GREY = "#888888"
DPI = 150
NUMBERED_TASKS = 8  # tasks up to which a matrix has room for its numbers


class Drawing(NamedTuple):
    """A picture as PNG, its description for screen readers, and its caption; one with a name gets a file of its own."""

    name: str
    png: bytes
    alt: str
    caption: str

    def save(self, folder: Path) -> Path:
        """Write the picture, completely or not at all."""
        path = folder / f"{self.name}.png"
        with replacing(path) as temporary:
            temporary.write_bytes(self.png)
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
    """A method's name in lines of about `width` characters, broken after + : @ and commas."""
    parts = re.sub(r"([+:,@])(?=.)", r"\1 ", method)
    lines = textwrap.wrap(parts, width, break_long_words=True) or [method]
    return "\n".join(re.sub(r"([+:,@]) ", r"\1", line) for line in lines)


def class_label(names: ClassNames, c: int, width: int) -> str:
    """A class's name in at most `width` characters, or `class 3` if it has none, or one with letters that the font of
    pictures lacks."""
    name, font = names.of(c), get_font(findfont(FontProperties()))
    if name == str(c) or not all(font.get_char_index(ord(letter)) for letter in name):
        return f"class {c}"
    return shorten(name, width)


def no_mathematics(text: str) -> str:
    return text.replace("$", r"\$")


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def task_names(record: Mapping[str, Any], width: int = 24) -> list[str]:
    """`1: airplane, automobile` for each task of a run, from the content of its config.json; none without names."""
    names = ClassNames.recorded(record)
    if not names.names:
        return []
    titles = [
        f"{number}: {', '.join(class_label(names, c, width) for c in classes)}"
        for number, classes in enumerate(classes_by_task(record), start=1)
    ]
    return [no_mathematics(shorten(title, width)) for title in titles]


# R and curves


def heatmap(
    axis: Axes, r: Sequence[Sequence[float]], limits: tuple[float, float], size: float = 9, names: Sequence[str] = ()
) -> Any:
    """`names` are those of the tasks, for the rows; by default their numbers."""
    tasks = len(r)
    table = np.full((tasks, tasks), np.nan)
    for i, row in enumerate(r):
        table[i, : len(row)] = row
    norm = LogNorm(*limits)
    image = axis.imshow(table, cmap="cividis_r", norm=norm)
    for i, j in zip(*np.nonzero(np.isfinite(table)), strict=True):
        if tasks <= NUMBERED_TASKS:
            colour = "white" if norm(table[i, j]) > 0.5 else "black"
            axis.text(j, i, f"{table[i, j]:.3g}", ha="center", va="center", color=colour, fontsize=size)
    ticks = range(0, tasks, 1 if tasks <= 10 else 2)
    axis.set_xticks(ticks, [str(j + 1) for j in ticks])
    axis.set_yticks(ticks, [names[i] if names else str(i + 1) for i in ticks])
    return image


def plain_log(axes: Any, which: str = "y") -> None:
    """A logarithmic axis with ticks that read 1, 2, 5, 10, 20, ... or, over a short range, evenly spaced ones."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(6) if high < 4 * low else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
    values = [max(value, 1e-3) for r in matrices for row in r for value in row]
    return min(values) / 1.1, max(values) * 1.1


def task_lines(axis: Axes, r: Sequence[Sequence[float]], names: Sequence[str] = ()) -> None:
    """FID of each task after each task, a line a task: a few in colours, many from dark to light as learnt. `names` are
    those of the tasks; by default their numbers."""
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
            label=f"task {names[j] if names else j + 1}",
        )
    axis.set_xticks(range(1, tasks + 1, 1 if tasks <= 10 else 3))
