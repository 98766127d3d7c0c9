"""Generated images in rows of classes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crl_diffusion.reporting.canvas import class_label, no_mathematics, shorten, wrap
from crl_diffusion.run_folder.class_names import UNNAMED, ClassNames
from crl_diffusion.run_folder.readers import read_config, read_samples

SAMPLE_ROWS, SAMPLE_COLUMNS, ACROSS = 2, 6, 30  # most images of a class, and of all classes side by side
DRAWN_CLASSES = 20  # columns that fit the width of a page


class Classes(NamedTuple):
    """The classes that a picture shows, task by task in the order learnt."""

    tasks: list[list[int]]
    total: int  # classes learnt
    names: ClassNames = UNNAMED

    @classmethod
    def learnt(cls, labels: np.ndarray, tasks: int, names: ClassNames = UNNAMED) -> Classes:
        """From the labels of the last evaluation, which come task by task; evenly chosen where there are too many."""
        order = list(dict.fromkeys(labels.tolist()))
        size = max(1, len(order) // tasks)
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        columns = set(np.linspace(0, len(order) - 1, min(len(order), DRAWN_CLASSES)).round().astype(int).tolist())
        chosen = [[c for j, c in enumerate(part) if i * size + j in columns] for i, part in enumerate(parts)]
        return cls(chosen, len(order), names)

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


def _heads(classes: Classes, inches: float) -> tuple[list[str], bool]:
    """The heads of columns of this width, and whether they stand upright: up to ten names lie, in two lines at most."""
    few, fitting = len(classes.labels) <= 10, max(int(inches / 0.078), 6)
    if not classes.names.names:
        return [f"{'class ' if few else ''}{c}" for c in classes.labels], False
    if not few:
        return [no_mathematics(class_label(classes.names, c, 16)) for c in classes.labels], True
    heads = []
    for c in classes.labels:
        first, *others = textwrap.wrap(class_label(classes.names, c, 2 * fitting), fitting) or [""]
        heads.append(no_mathematics("\n".join([first, *([shorten(" ".join(others), fitting)] if others else [])])))
    return heads, False


def show_strips(strips: Sequence[tuple[str, np.ndarray]], classes: Classes, title: str) -> Figure:
    """Rows of cells under one another, each with its label on the left; columns are headed by their class."""
    height, width, _ = strips[0][1].shape
    labels = [wrap(label, 26) for label, _ in strips]
    inches, left = 10.0, 0.15 + 0.08 * max(len(line) for label in labels for line in label.split("\n"))
    lines = max(label.count("\n") + 1 for label in labels)
    columns = classes.labels
    heads, upright = _heads(classes, (inches - left - 0.15) / len(columns))
    # Points above the pictures: the heads of columns, then their tasks.
    letters = max(map(len, heads)) if upright else 0
    above = 19 + max(0, 5.8 * letters - 10 if upright else 11 * max(head.count("\n") for head in heads))
    row = max((inches - left - 0.15) * height / width, 0.17 * lines) + 0.1
    head, foot = (0.95 if title else 0.6) + (above - 19) / 72, 0.1
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
    cell = (width + 1) / len(columns)
    centres = [cell * (i + 0.5) - 1 for i in range(len(columns))]
    top.set_xticks(centres, heads, fontsize=9, rotation="vertical" if upright else "horizontal")
    top.xaxis.tick_top()
    if len(columns) > 10:
        for text, height, colour in (("class", 5, "black"), ("task", above, "#555555")):
            where = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "fontsize": 9}
            top.annotate(text, (0.0, 1.0), xytext=(-6, height), color=colour, **where)
    first = 0
    for number, part in enumerate(classes.tasks, start=1):
        if part:
            top.annotate(
                f"task {number}" if len(columns) <= 10 else str(number),
                ((first + len(part) / 2) * cell - 1, 1.0),
                xytext=(0, above),
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


SHEET_ROWS, SHEET_COLUMNS = 100, 12  # most classes, and images of each, on a sheet


def sheet(rows: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """A contact sheet: a row for each class, with its label and its images, uint8 (N, C, S, S)."""
    side = rows[0][1].shape[-1]
    gap, columns = max(1, side // 8), max(len(pixels) for _, pixels in rows)
    one = Classes([[0]], 1)
    strips = [strip(pixels, np.zeros(len(pixels)), one, 1, columns) for _, pixels in rows]
    space = np.ones((gap, strips[0].shape[1], 3))
    picture = np.concatenate([part for image in strips for part in (image, space)][:-1])
    labels = [no_mathematics(label) for label, _ in rows]
    left, head, inch = 0.3 + 0.075 * max(map(len, labels)), 0.45, 0.55 / (side + gap)  # inch: of one pixel
    across, down = picture.shape[1] * inch, picture.shape[0] * inch
    width, height = max(left + across + 0.15, 5), down + head + 0.1
    figure = plt.figure(figsize=(width, height))
    axis = figure.add_axes((left / width, 0.1 / height, across / width, down / height))
    axis.imshow(picture, interpolation="nearest", aspect="equal")
    axis.set_yticks([(side + gap) * i + side / 2 - 0.5 for i in range(len(rows))], labels, fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.text(0.15 / width, 1 - 0.12 / height, no_mathematics(title), va="top", fontsize=9, color="#555555")
    return figure


def grid_over_tasks(run: Path, tasks: int, title: str = "") -> tuple[Figure, Classes] | None:
    """Samples after each task, a row each; None where the run keeps none."""
    samples = {task: images for task in range(1, tasks + 1) if (images := read_samples(run, task)) is not None}
    if not samples:
        return None
    classes = Classes.learnt(samples[max(samples)][1], tasks, ClassNames.recorded(read_config(run)))
    strips = strips_of([(f"after task {task}", images) for task, images in samples.items()], classes)
    return show_strips(strips, classes, title), classes
