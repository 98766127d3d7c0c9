"""Pictures of each method's results: samples, the matrix R of FIDs, curves over tasks. `effects.py` compares methods.

Every picture takes as many methods as there are: one row or one panel each. Nothing here trains, samples or
measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crl_diffusion.reporting import canvas, samples
from crl_diffusion.reporting.canvas import COLOURS, DASHES, MARKERS, Drawing, drawing, plain_log, wrap
from crl_diffusion.reporting.runs import Finished, Groups
from crl_diffusion.run_folder.class_names import ClassNames
from crl_diffusion.run_folder.readers import read_samples

WIDTH = 10.2  # inches of a grid of panels
NAME_WIDTH = 34  # characters of a method's name in a line of its own


def _panels(names: Sequence[str], height: float, x: str, y: str, **sharing: Any) -> tuple[Figure, list[Axes], int]:
    """A figure, its panels, each with a method's name as title, and the number of columns. `x`, `y`: axis labels."""
    columns = min(len(names), 3 if len(names) <= 9 else 4)
    rows = -(-len(names) // columns)
    width = min(WIDTH / columns, 3.4)
    titles = [wrap(name, int(NAME_WIDTH * min(width / 3.4, 1))) for name in names]
    lines = sum(max(title.count("\n") for title in titles[i : i + columns]) for i in range(0, len(names), columns))
    size = (width * columns + 0.6, height * width / 3.4 * rows + 0.17 * lines + 0.7)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing)
    panels = list(axes.flat[: len(names)])
    for k, (axis, title) in enumerate(zip(panels, titles, strict=True)):
        axis.set_title(title, fontsize=9.5)
        axis.set_xlabel(x if k + columns >= len(names) else "")
        axis.set_ylabel(y if k % columns == 0 else "")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    return figure, panels, columns


# Samples


def _representatives(groups: Groups) -> dict[str, Finished]:
    """One run of each method, of the smallest seed that most methods have."""
    all_seeds = sorted(run.seed for group in groups.values() for run in group)
    seed = max(dict.fromkeys(all_seeds), key=all_seeds.count)
    return {name: next((run for run in group if run.seed == seed), group[0]) for name, group in groups.items()}


def final_samples(groups: Groups, name: str) -> Drawing | None:
    """Samples of every method after the last task."""
    chosen = _representatives(groups)
    tasks = max(len(run.summary["fid_matrix"]) for run in chosen.values())
    drawn = {label: images for label, run in chosen.items() if (images := read_samples(run.path, tasks)) is not None}
    if not drawn:
        return None
    names = ClassNames.recorded(next(iter(chosen.values())).record)
    classes = samples.Classes.learnt(next(iter(drawn.values()))[1], tasks, names)
    strips = samples.strips_of([*drawn.items()], classes)
    text = (
        f"What each method draws after the last of {tasks} tasks, seed {next(iter(chosen.values())).seed}. Columns are "
        "classes in the order learnt, all of which were learnt. All methods start from the same noise; images are the "
        f"first of each class, not chosen.{classes.note}"
    )
    alt = f"Drawn images of {len(classes.labels)} classes for {len(drawn)} methods."
    return drawing(name, samples.show_strips(strips, classes, ""), alt, text)


def sample_grids(groups: Groups) -> dict[str, Drawing]:
    """For each method, images of all classes after each task."""
    result = {}
    for name, run in _representatives(groups).items():
        tasks = len(run.summary["fid_matrix"])
        if (grid := samples.grid_over_tasks(run.path, tasks)) is not None:
            figure, classes = grid
            text = (
                f"{name}, seed {run.seed}: images drawn after each task. Each class starts from the same noise in "
                f"every row; grey: not yet learnt.{classes.note}"
            )
            alt = f"Images drawn by {name}, rows after each task, columns classes."
            result[name] = drawing("", figure, alt, text)
    return result


# R and what is derived from it


def _mean_matrix(runs: Sequence[Finished]) -> list[list[float]]:
    matrices = [run.summary["fid_matrix"] for run in runs]
    return [[float(np.mean([r[i][j] for r in matrices])) for j in range(len(row))] for i, row in enumerate(matrices[0])]


def fid_matrices(groups: Groups, name: str) -> Drawing:
    matrices = {method: _mean_matrix(group) for method, group in groups.items()}
    limits = canvas.limits(list(matrices.values()))
    figure, axes, columns = _panels(list(groups), 3.1, "FID of task", "after learning task")
    for axis, r in zip(axes, matrices.values(), strict=True):
        image = canvas.heatmap(axis, r, limits, 9 if columns < 4 else 7.5)
    canvas.colour_bar(figure, image, axes, rows=-(-len(axes) // columns))
    text = (
        "R: FID of each task (column) after learning each task (row), means over the seeds of the method, one scale "
        "for all methods. The diagonal is quality when learnt; a column that grows darker downwards is a task that is "
        "being forgotten. Joint training is evaluated only at the end."
    )
    return drawing(name, figure, f"Lower triangular heatmaps of FID for {len(groups)} methods.", text)


def task_curves(groups: Groups, name: str) -> Drawing | None:
    """FID of each task after each task: a panel a method, one scale."""
    continual = {method: group for method, group in groups.items() if all(group[0].summary["fid_matrix"])}
    if not continual:
        return None
    figure, axes, _ = _panels(list(continual), 2.5, "after learning task", "FID (log scale)", sharey=True)
    for axis, group in zip(axes, continual.values(), strict=True):
        canvas.task_lines(axis, _mean_matrix(group))
        plain_log(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(10, len(labels)), frameon=False, fontsize=9)
    text = "FID of each task after each task, means over seeds, log scale. A flat line is a task that is kept."
    return drawing(name, figure, f"Curves of FID by task for {len(continual)} methods.", text)


def average_curves(groups: Groups, name: str) -> Drawing:
    """Mean FID of the tasks learnt so far: all methods in one panel or, if they are many, a panel for each."""
    lines = {}
    for method, group in groups.items():
        matrices = [run.summary["fid_matrix"] for run in group]
        stages = [i for i, row in enumerate(matrices[0]) if row]
        lines[method] = [i + 1 for i in stages], np.array([[np.mean(r[i]) for i in stages] for r in matrices])
    tasks = max(len(group[0].summary["fid_matrix"]) for group in groups.values())
    few = len(groups) <= len(COLOURS)
    if few:
        figure, axis = plt.subplots(figsize=(9.6, 4.4), layout="constrained")
        axis.set(
            xlabel="after learning task", ylabel="mean FID of the tasks learnt so far\n(lower is better, log scale)"
        )
        axes = [axis]
    else:
        figure, axes, _ = _panels(list(groups), 2.5, "after learning task", "mean FID so far", sharey=True)
    for k, (method, (x, curves)) in enumerate(lines.items()):
        axis = axes[0] if few else axes[k]
        if not few:
            for xs, others in lines.values():
                axis.plot(xs, others.mean(0), color="#cccccc", linewidth=0.8, marker="." if len(xs) == 1 else "")
        colour = COLOURS[k] if few else COLOURS[0]
        style: dict[str, Any] = {"marker": "o", "markersize": 5}
        if few:
            style = {"linestyle": DASHES[k % len(DASHES)], "marker": MARKERS[k], "markersize": 6 + 2 * k}
            style["markevery"] = max(1, tasks // 7)
        if len(x) == 1 and tasks > 1:  # evaluated only at the end
            axis.axhline(
                curves.mean(), color=colour, linestyle=(0, (1, 2)), linewidth=1.6, label=f"{method}\n(end only)"
            )
            continue
        if len(curves) > 1:
            axis.plot(x, curves.T, color=colour, linewidth=0.7, alpha=0.6)
        axis.plot(x, curves.mean(0), color=colour, linewidth=2, markerfacecolor="none", label=wrap(method, 26), **style)
    for axis in axes:
        plain_log(axis)
        axis.set_xticks(range(1, tasks + 1, 1 if tasks <= 10 else 3))
    if few:
        axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    text = (
        "Average FID after each task: mean over the tasks learnt so far, lower is better, log scale. Thick: mean over "
        "seeds; thin: each seed. A dotted level line was evaluated only at the end."
        + ("" if few else " Grey: all the other methods.")
    )
    return drawing(name, figure, f"Average FID after each task for {len(groups)} methods.", text)
