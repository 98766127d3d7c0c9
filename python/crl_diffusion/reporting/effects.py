"""Pictures of differences between methods: paired differences, lambda sweeps, Fisher matrices, scores over data sets.

Every picture takes as many methods as there are: one row or one panel each. Nothing here trains, samples or measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from crl_diffusion.files import Row
from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.canvas import COLOURS, GREY, MARKERS, Drawing, drawing, no_mathematics, wrap
from crl_diffusion.reporting.charts import NAME_WIDTH
from crl_diffusion.reporting.penalty_tables import LOW_RHO, LOW_SIGNAL, estimates_with, mean_of
from crl_diffusion.reporting.runs import Finished, Groups
from crl_diffusion.reporting.tables import AVERAGE, FORGETTING, HEADLINE, LEARNT, MINUS, number, values


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """A row for each method, from the top."""
    axis.set_yticks(range(len(names)), [wrap(name, NAME_WIDTH) for name in names], fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)


def rows_height(names: Sequence[str], least: float = 0.34) -> float:
    """Inches of a picture with a row for each method, in which the names' lines have room."""
    lines = max(wrap(name, NAME_WIDTH).count("\n") + 1 for name in names)
    return 1.2 + len(names) * max(least, 0.17 * lines)


# Differences and sweeps

DECADES_WITH_ROOM = 6  # on one of three axes side by side, for a tick at each


def forest(groups: Groups, baseline: str, name: str) -> Drawing | None:
    """Paired differences to the baseline: one row a method, all seeds as dots, mean and 95 % t interval."""
    names = [method for method in groups if method != baseline]
    if baseline not in groups or not names:
        return None
    columns, size = (AVERAGE, LEARNT, FORGETTING), (10, rows_height(names))
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr]
    squeezed = False
    for axis, column in zip(axes, columns, strict=True):
        base = values(groups[baseline], column.key)
        differences = [list(seeds.paired(values(groups[method], column.key), base).values()) for method in names]
        reach = []  # for each method, the largest distance of its seeds and its interval from zero
        for y, row in enumerate(differences):
            axis.axhspan(y - 0.5, y + 0.5, color="#f4f4f4" if y % 2 else "white", zorder=0)
            if not row:
                continue
            mean, _, half_width, n = seeds.estimate(row)
            axis.plot(row, [y + 0.18] * n, "o", color=COLOURS[0], markersize=3.5, alpha=0.55, markeredgewidth=0)
            if half_width is not None:
                axis.errorbar(mean, y - 0.08, xerr=half_width, color="black", capsize=3, linewidth=1.4)
                axis.plot(mean, y - 0.08, "D", color="black", markersize=5)
            reach.append(max(abs(mean) + (half_width or 0.0), *map(abs, row)))
        squeezed = squeeze(axis, [x for row in differences for x in row], reach) or squeezed
        axis.axvline(0, color=COLOURS[1], linewidth=1.2)
        axis.set_xlabel(
            f"{column.title[:-2]}, FID points,\nless {wrap(baseline, NAME_WIDTH)}'s (left: better)", fontsize=9
        )
    name_rows(axes[0], names)
    text = (
        f"Paired differences to {baseline}, the orange line: blue dots are seeds, black the mean and its 95 % t "
        "interval (none from a single seed). An interval that crosses the line does not show a difference."
        + (" Where a few methods are far off, the axis is linear near zero and logarithmic beyond." if squeezed else "")
    )
    return drawing(name, figure, f"Forest plot of {len(names)} methods against {baseline}.", text)


def squeeze(axis: Axes, differences: Sequence[float], reach: Sequence[float]) -> bool:
    """Where a few methods are far from the others, make the x axis linear as far as half of them reach at least, and
    logarithmic beyond. `reach` is how far from zero each method's differences go, interval included."""
    middle = float(np.median([distance for distance in reach if distance] or [0.0]))
    if not middle or max(reach) <= 20 * middle:
        return False
    power = 10.0 ** math.floor(math.log10(middle))
    linear, linear_decades = float(f"{math.ceil(middle / power) * power:.1g}"), 1.5
    axis.set_xscale("symlog", linthresh=linear, linscale=linear_decades)
    left, right = min(differences), max(differences)
    decades = sum(math.log10(max(linear, end) / linear) + linear_decades for end in (right, -left))
    step = 1 if decades <= DECADES_WITH_ROOM else 2
    ends = [s * linear * 10**k for k in range(0, 7, step) if linear * 10**k <= 1.2 * max(reach) for s in (-1, 1)]
    ticks = [0.0, *(x for x in ends if left <= x <= right or abs(x) == linear)]
    axis.set_xticks(ticks, [f"{x:g}".replace("-", MINUS) for x in ticks], minor=False)
    axis.minorticks_off()
    return True


def without_penalty(run: Finished, groups: Groups) -> str | None:
    """The label of the same replay and settings without a penalty."""
    wanted = {**run.config["recipe"], "penalty": None}, run.label.partition("@")[2]
    others = {name: (group[0].config["recipe"], group[0].label.partition("@")[2]) for name, group in groups.items()}
    return next((name for name, other in others.items() if other == wanted), None)


def sweeps(groups: Groups) -> dict[str, dict[float, Sequence[Finished]]]:
    """Families of methods that differ in lam only, with two or more of it: their runs by lam."""
    families: dict[str, dict[float, Sequence[Finished]]] = {}
    for group in groups.values():
        if group[0].lam is not None:
            families.setdefault(group[0].family, {})[group[0].lam] = group
    return {family: dict(sorted(runs.items())) for family, runs in families.items() if len(runs) > 1}


def lam_sweep(groups: Groups, name: str) -> Drawing | None:
    """Average FID and forgetting against lam: a row of panels a family."""
    families = sweeps(groups)
    if not families:
        return None
    figure, axes = plt.subplots(
        len(families), 2, figsize=(10, 2.9 * len(families) + 0.3), squeeze=False, layout="constrained"
    )
    for row, (family, runs) in zip(axes, families.items(), strict=True):
        no_penalty = without_penalty(next(iter(runs.values()))[0], groups)
        positions = places(list(runs))
        for axis, column in zip(row, HEADLINE, strict=True):
            if no_penalty is None:
                axis.plot([], [], " ", label="no run of this replay without a penalty")
            elif reference := list(values(groups[no_penalty], column.key).values()):
                axis.axhspan(min(reference), max(reference), color=COLOURS[1], alpha=0.15, linewidth=0)
                mean = float(np.mean(reference))
                axis.axhline(mean, color=COLOURS[1], linestyle="--", label=f"no penalty: {no_penalty}")
            by_lam = {lam: list(values(group, column.key).values()) for lam, group in runs.items()}
            for lam, dots in by_lam.items():
                axis.plot([positions[lam]] * len(dots), dots, "o", color=COLOURS[0], markersize=4, alpha=0.5)
            measured = [lam for lam, dots in by_lam.items() if dots]
            means = [float(np.mean(by_lam[lam])) for lam in measured]
            axis.plot([positions[lam] for lam in measured], means, color=COLOURS[0], label="mean over seeds")
            axis.set_xscale("log")
            axis.set_xticks([positions[lam] for lam in runs], [f"{lam:g}" for lam in runs], fontsize=8)
            axis.minorticks_off()
            axis.set_xlabel("lam (log scale)")
            axis.set_ylabel(f"{column.title[:-2]}\n(FID points, lower is better)", fontsize=9)
            axis.set_title(wrap(family, 48), fontsize=10)
        row[0].legend(frameon=False, fontsize=8)
    text = (
        "Strength of the penalty, lam, against average FID and forgetting. Dots: seeds; line: their mean; dashed: the "
        "same replay without a penalty (band: its seeds, smallest to largest). lam = 0 and inf, where there are any, "
        "are set one step beside the others. Every panel has its own scale. A strength picked here is to be tested on "
        "other seeds."
    )
    return drawing(name, figure, f"Average FID and forgetting against lam for {len(families)} methods.", text)


def places(lams: Sequence[float]) -> dict[float, float]:
    """Where each lam stands on a log axis: 0 and inf a factor of 10 outside of the others."""
    inner = [lam for lam in lams if 0 < lam < float("inf")] or [1.0]
    return {lam: min(inner) / 10 if lam == 0 else min(lam, max(inner) * 10) for lam in lams}


# Fisher matrices and data sets

NUMBERED_TASKS = 6  # tasks up to which a cell has room for its number
FISHER_PANELS = (  # key, title, limit, digits
    ("kappa", "κ", -math.inf, 3),
    ("rho", f"ρ (box: below {LOW_RHO:g})", LOW_RHO, 2),
    ("signal_share", f"signal share (box: below {LOW_SIGNAL:g})", LOW_SIGNAL, 2),
)


def fisher(rows: Mapping[str, Sequence[Sequence[Row]]], name: str) -> Drawing | None:
    """kappa, rho and signal share of every method and task, means over seeds."""
    panels = [panel for panel in FISHER_PANELS if estimates_with(rows, panel[0])]
    methods = {name: tasks for name, tasks in rows.items() if any(estimates_with({name: tasks}, p[0]) for p in panels)}
    if not methods:
        return None
    tasks = max(task_rows[0]["task"] for by_task in methods.values() for task_rows in by_task)
    size = (2.6 + 2.5 * len(panels), rows_height(list(methods)))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (key, title, limit, digits) in zip(axes[0], panels, strict=True):
        table = np.full((len(methods), tasks), np.nan)
        for i, by_task in enumerate(methods.values()):
            for task_rows in by_task:
                mean = mean_of(task_rows, key)
                table[i, task_rows[0]["task"] - 1] = np.nan if mean is None else mean
        axis.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, j in zip(*np.nonzero(np.isfinite(table)), strict=True):
            if tasks <= NUMBERED_TASKS:
                text = number(table[i, j], digits).replace("0.", ".")
                colour = "black" if table[i, j] > 0.5 else "white"
                axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
            if table[i, j] < limit:
                box = plt.Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor=COLOURS[1], linewidth=1.6)
                axis.add_patch(box)
        ticks = range(0, tasks, 1 if tasks <= 10 else 3)
        axis.set_xticks(ticks, [str(j + 1) for j in ticks])
        axis.set_xlabel("after learning task")
        axis.set_title(title, fontsize=10)
    name_rows(axes[0, 0], list(methods))
    text = "Each task's Fisher matrix, means over seeds, no units; dark is 0, light is 1. Orange box: below the limit."
    return drawing(name, figure, f"Heatmaps of kappa, rho and signal share for {len(methods)} methods.", text)


def across(scores: Mapping[str, Mapping[str, Mapping[int, float]]], data_sets: Sequence[str], name: str) -> Drawing:
    """Normalised scores, one row a method, a marker a data set."""
    size = (9, rows_height(list(scores), 0.2 * len(data_sets) + 0.15))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    step = 0.8 / len(data_sets)
    for k, data in enumerate(data_sets):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        label: str | None = no_mathematics(data)
        for y, by_data in enumerate(scores.values()):
            if data not in by_data:
                continue
            dots = list(by_data[data].values())
            mean, _, half_width, n = seeds.estimate(dots)
            height = y - 0.4 + step * (k + 0.5)
            axis.plot(dots, [height] * n, ".", color=colour, alpha=0.4, markersize=5)
            style = {"color": colour, "marker": marker, "markersize": 5.5, "capsize": 2.5}
            axis.errorbar(mean, height, xerr=half_width, label=label, **style)
            label = None  # the legend names a data set once
    for y in range(1, len(scores)):
        axis.axhline(y - 0.5, color="#eeeeee", linewidth=1, zorder=0)
    for x in (0, 1):
        axis.axvline(x, color=GREY, linewidth=1, linestyle="--", zorder=0)
    name_rows(axis, list(scores))
    axis.set_xlabel("(average FID − joint) / (fine-tune − joint); dashed: 0 as joint training, 1 as fine-tuning")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    text = (
        "Normalised scores of each data set, paired by seed: large markers are means with 95 % t intervals, dots seeds."
    )
    return drawing(name, figure, f"Normalised scores of {len(scores)} methods on {len(data_sets)} data sets.", text)
