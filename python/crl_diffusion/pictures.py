"""Pictures, drawn from run folders: samples, the matrix R, curves. Nothing here trains, samples or measures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, with or without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from crl_diffusion.records import Row, read_json, read_rows
from crl_diffusion.report import Finished, fid_matrix, grouped

# Okabe and Ito's palette, which colour-blind readers can tell apart, and markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")  # lines of methods that do equally well lie on one another
SHOWN_SAMPLES = 4  # images of each class in a cell of one run's picture


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_suffix(f".{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=150, facecolor="white")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _samples(run: Path, after_task: int) -> tuple[np.ndarray, np.ndarray]:
    from safetensors.numpy import load_file

    tensors = load_file(run / "samples" / f"after-task-{after_task}.safetensors")
    return tensors["pixels"], tensors["labels"]


def _strip(pixels: np.ndarray, labels: np.ndarray, classes: int, rows: int, columns: int) -> np.ndarray:
    """One row of cells, a cell a class with rows x columns images, as floats 0 .. 1; NaN (not drawn) where none."""
    side = pixels.shape[-1]
    gap = max(1, side // 8)
    height, width = rows * (side + gap) - gap, columns * (side + gap) - gap
    cells = []
    for c in range(classes):
        cell = np.full((height, width), np.nan)
        for i, image in enumerate(pixels[labels == c][: rows * columns]):
            top, left = (i // columns) * (side + gap), (i % columns) * (side + gap)
            cell[top : top + side, left : left + side] = image.mean(0) / 255
        cells += [cell, np.full((height, 3 * gap), np.nan)]
    return np.concatenate(cells[:-1], axis=1)


def _show_strips(strips: Sequence[tuple[str, np.ndarray]], classes: int, title: str, caption: str) -> Figure:
    """Rows of cells under one another, each with its label on the left; columns are headed by their class."""
    height, width = strips[0][1].shape
    inches = 10.0
    row_inches = inches * 0.84 * height / width
    total = row_inches * 1.12 * len(strips) + 1.25
    figure, axes = plt.subplots(len(strips), 1, figsize=(inches, total), squeeze=False)
    figure.subplots_adjust(left=0.145, right=0.985, top=1 - 0.72 / total, bottom=0.48 / total, hspace=0.12)
    colours = plt.get_cmap("gray").with_extremes(bad="#e8e8e8")
    for i, (label, strip) in enumerate(strips):
        axis: Axes = axes[i, 0]
        axis.imshow(strip, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_yticks([strip.shape[0] / 2 - 0.5], [label])
        axis.tick_params(length=0)
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    top: Axes = axes[0, 0]
    cell = (width + 1) / classes
    top.set_xticks([cell * (c + 0.5) - 1 for c in range(classes)], [f"class {c}" for c in range(classes)])
    top.xaxis.tick_top()
    figure.suptitle(title, y=1 - 0.12 / total, va="top", fontsize=13)
    figure.text(0.145, 0.16 / total, caption, fontsize=9, va="bottom")
    return figure


def _heatmap(axis: Axes, r: Sequence[Sequence[float]], title: str, limits: tuple[float, float]) -> Any:
    tasks = len(r)
    values = np.full((tasks, tasks), np.nan)
    for i, row in enumerate(r):
        values[i, : len(row)] = row
    norm = LogNorm(*limits)
    image = axis.imshow(values, cmap="cividis_r", norm=norm)
    for i in range(tasks):
        for j in range(tasks):
            if np.isfinite(values[i, j]):
                colour = "white" if norm(values[i, j]) > 0.5 else "black"
                axis.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(tasks), [str(j + 1) for j in range(tasks)])
    axis.set_yticks(range(tasks), [str(i + 1) for i in range(tasks)])
    axis.set_xlabel("FID of task")
    axis.set_ylabel("after learning task")
    axis.set_title(title, fontsize=11)
    return image


def _plain_log(axis: Axes) -> None:
    """A logarithmic axis with ticks that read 1, 2, 5, 10, 20, ..."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _colour_bar(figure: Figure, image: Any, axes: Any) -> None:
    low, high = image.norm.vmin, image.norm.vmax
    marks = [m * 10.0**power for power in range(-3, 7) for m in (1, 2, 3, 5, 7) if low <= m * 10.0**power <= high]
    bar = figure.colorbar(image, ax=axes, label="FID (lower is better, log scale)", shrink=0.8)
    bar.set_ticks(marks, labels=[f"{mark:g}" for mark in marks])
    bar.set_ticks([], minor=True)


def _limits(matrices: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Ends of a logarithmic scale for all values of several matrices."""
    values = [max(value, 1e-3) for r in matrices for row in r for value in row]
    return min(values) / 1.1, max(values) * 1.1


def _mean_matrix(runs: Sequence[Finished]) -> list[list[float]]:
    matrices = [run.summary["fid_matrix"] for run in runs]
    return [[float(np.mean([m[i][j] for m in matrices])) for j in range(len(row))] for i, row in enumerate(matrices[0])]


def of_run(run: Path) -> list[Path]:
    """Samples, R and curves of one run."""
    config, rows = read_json(run / "config.json")["run"], read_rows(run / "metrics.jsonl")
    name = f"{config['method']} on {config['data']}, seed {config['seed']}"
    r = fid_matrix(rows)
    classes = config["classes_per_task"] * len(r)
    evaluated = [i + 1 for i, row in enumerate(r) if row]
    strips = [(f"after task {i}", _strip(*_samples(run, i), classes, 2, SHOWN_SAMPLES // 2)) for i in evaluated]
    caption = "Each class starts from the same noise in every row. Grey: not yet learnt."
    paths = [_save(_show_strips(strips, classes, f"Samples of {name}", caption), run / "samples.png")]

    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    image = _heatmap(axis, r, name, _limits([r]))
    _colour_bar(figure, image, axis)
    paths.append(_save(figure, run / "fid_matrix.png"))

    paths.append(_save(_curves(rows, r, name), run / "curves.png"))
    return paths


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
        left.plot(x, replayed, color=COLOURS[1], linestyle="--", label="replayed images")
    for boundary in start[1:]:
        left.axvline(boundary, color="#888888", linewidth=0.8, linestyle=":")
    _plain_log(left)
    left.set_xlabel("optimization step (dotted: a new task begins)")
    left.set_ylabel("loss, mean squared error per pixel")
    left.set_title("Training loss", fontsize=11)
    left.legend(frameon=False)
    for j in range(len(r)):
        after = [i for i in range(len(r)) if len(r[i]) > j]
        right.plot(
            [i + 1 for i in after],
            [r[i][j] for i in after],
            color=COLOURS[j % len(COLOURS)],
            marker=MARKERS[j % len(MARKERS)],
            label=f"task {j + 1}",
        )
    right.set_xticks(range(1, len(r) + 1))
    right.set_ylim(bottom=0)
    right.set_xlabel("after learning task")
    right.set_ylabel("FID (lower is better)")
    right.set_title("FID of each task", fontsize=11)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # beside: lines may go anywhere
    figure.suptitle(name, fontsize=13)
    return figure


def comparison(runs: Sequence[Finished], out: Path, order: Sequence[str] = ()) -> list[Path]:
    """What every method's model draws in the end, R of each method, and the average FID after each task."""
    groups = grouped(runs, order)
    first = runs[0].config
    tasks = first["tasks"]
    classes = first["classes_per_task"] * tasks
    seed = min(set.intersection(*({run.seed for run in group} for group in groups.values())), default=None)
    paths = []
    if seed is not None:
        chosen = {name: next(run for run in group if run.seed == seed) for name, group in groups.items()}
        strips = [(name, _strip(*_samples(run.path, tasks), classes, 3, 3)) for name, run in chosen.items()]
        title = f"{first['data']} after task {tasks} of {tasks}: what each method still draws"
        caption = f"Seed {seed}. Same starting noise in every row; images are the first of each class, not chosen."
        paths.append(_save(_show_strips(strips, classes, title, caption), out / "samples.png"))

    matrices = {name: _mean_matrix(group) for name, group in groups.items()}
    limits = _limits(list(matrices.values()))
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.0 * columns + 0.8, 3.9 * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (name, r) in zip(axes.flat, matrices.items(), strict=False):
        image = _heatmap(
            axis, r, name if len(groups[name]) == 1 else f"{name}, mean of {len(groups[name])} seeds", limits
        )
    _colour_bar(figure, image, axes)
    figure.suptitle(f"{first['data']}: FID of each task after each task", fontsize=13)
    paths.append(_save(figure, out / "fid_matrices.png"))
    paths.append(_save(_average_curves(groups, first["data"]), out / "average_fid.png"))
    return paths


def _average_curves(groups: dict[str, list[Finished]], data: str) -> Figure:
    figure, axis = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    several = any(len(group) > 1 for group in groups.values())
    for k, (name, group) in enumerate(groups.items()):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        matrices = [run.summary["fid_matrix"] for run in group]
        after = [i for i, row in enumerate(matrices[0]) if row]
        curves = np.array([[np.mean(m[i]) for i in after] for m in matrices])
        x = [i + 1 for i in after]
        if len(after) == 1 and len(matrices[0]) > 1:  # evaluated only at the end
            axis.axhline(curves.mean(), color=colour, linestyle="--", label=f"{name} (evaluated at the end)")
            continue
        if len(group) > 1:
            axis.plot(x, curves.T, color=colour, linewidth=0.7, alpha=0.6)
        (line,) = axis.plot(x, curves.mean(0), color=colour, linewidth=2, linestyle=DASHES[k % len(DASHES)], label=name)
        line.set(marker=marker, markerfacecolor="none", markersize=6 + 2 * k)
    axis.set_xticks(range(1, 1 + max(len(g[0].summary["fid_matrix"]) for g in groups.values())))
    _plain_log(axis)
    axis.set_xlabel("after learning task")
    axis.set_ylabel("mean FID of the tasks learnt so far\n(lower is better, log scale)")
    axis.set_title(f"{data}: average FID after each task" + (" (thin lines: seeds)" if several else ""), fontsize=12)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
