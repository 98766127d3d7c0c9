"""Generated images in rows of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crl_diffusion.reporting.canvas import wrap
from crl_diffusion.run_folder.readers import read_samples

SAMPLE_ROWS, SAMPLE_COLUMNS, ACROSS = 2, 6, 30  # most images of a class, and of all classes side by side
DRAWN_CLASSES = 20  # columns that fit the width of a page


class Classes(NamedTuple):
    """The classes that a picture shows, task by task in the order learnt."""

    tasks: list[list[int]]
    total: int  # classes learnt

    @classmethod
    def learnt(cls, labels: np.ndarray, tasks: int) -> Classes:
        """From the labels of the last evaluation, which come task by task; evenly chosen where there are too many."""
        order = list(dict.fromkeys(labels.tolist()))
        size = max(1, len(order) // tasks)
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        columns = set(np.linspace(0, len(order) - 1, min(len(order), DRAWN_CLASSES)).round().astype(int).tolist())
        chosen = [[c for j, c in enumerate(part) if i * size + j in columns] for i, part in enumerate(parts)]
        return cls(chosen, len(order))

    @property
    def labels(self) -> list[int]:
        return [c for part in self.tasks for c in part]

    @property
    def note(self) -> str:
        few = len(self.labels) < self.total
        return f" {len(self.labels)} of {self.total} classes, evenly chosen." if few else ""


def strip(pixels: np.ndarray, labels: np.ndarray, classes: Classes, rows: int, columns: int) -> np.ndarray:
    """One row of cells, a cell a class with rows x columns images, as floats (H, W, 3) from 0 to 1: white between
    cells, light grey where there is no image."""
    side = pixels.shape[-1]
    gap = max(1, side // 8)
    height, width = rows * (side + gap) - gap, columns * (side + gap) - gap
    cells = []
    for c in classes.labels:
        block = np.full((height, width, 3), 0.91 if not (labels == c).any() else 1.0)
        for i, image in enumerate(pixels[labels == c][: rows * columns]):
            top, left = (i // columns) * (side + gap), (i % columns) * (side + gap)
            colour = np.broadcast_to(np.moveaxis(image, 0, -1), (side, side, 3))  # grey images: one channel, thrice
            block[top : top + side, left : left + side] = colour / 255
        cells += [block, np.ones((height, 3 * gap, 3))]
    return np.concatenate(cells[:-1], axis=1)


def strips_of(
    samples: Sequence[tuple[str, tuple[np.ndarray, np.ndarray]]], classes: Classes
) -> list[tuple[str, np.ndarray]]:
    """Labelled rows of cells, with as many images of a class as fit the width."""
    columns = min(max(ACROSS // len(classes.labels), 1), SAMPLE_COLUMNS)
    return [(label, strip(*images, classes, SAMPLE_ROWS, columns)) for label, images in samples]


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
    columns = classes.labels
    cell = (width + 1) / len(columns)
    named = "class " if len(columns) <= 10 else ""
    top.set_xticks([cell * (i + 0.5) - 1 for i in range(len(columns))], [f"{named}{c}" for c in columns], fontsize=9)
    top.xaxis.tick_top()
    if len(columns) > 10:
        for text, height, colour in (("class", 5, "black"), ("task", 19, "#555555")):
            where = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "fontsize": 9}
            top.annotate(text, (0.0, 1.0), xytext=(-6, height), color=colour, **where)
    first = 0
    for number, part in enumerate(classes.tasks, start=1):
        if part:
            top.annotate(
                f"task {number}" if len(columns) <= 10 else str(number),
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
    samples = {task: images for task in range(1, tasks + 1) if (images := read_samples(run, task)) is not None}
    if not samples:
        return None
    classes = Classes.learnt(samples[max(samples)][1], tasks)
    strips = strips_of([(f"after task {task}", images) for task, images in samples.items()], classes)
    return show_strips(strips, classes, title), classes
