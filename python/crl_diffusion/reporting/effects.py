"""Pictures of what changes between methods: paired differences, lambda sweeps, Fisher matrices, scores over data sets.

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
from crl_diffusion.reporting.canvas import COLOURS, GREY, MARKERS, Drawing, drawing, wrap
from crl_diffusion.reporting.charts import NAME_WIDTH
from crl_diffusion.reporting.penalty_tables import LOW_RHO, LOW_SIGNAL, mean_of
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
        found = [list(seeds.paired(values(groups[m], column.key), base).values()) for m in names]
        reach = []  # of each method: how far from zero its seeds and its interval go
        for y, part in enumerate(found):
            axis.axhspan(y - 0.5, y + 0.5, color="#f4f4f4" if y % 2 else "white", zorder=0)
            if not part:
                continue
            e = seeds.estimate(part)
            axis.plot(part, [y + 0.18] * e.n, "o", color=COLOURS[0], markersize=3.5, alpha=0.55, markeredgewidth=0)
            if e.half is not None:
                axis.errorbar(e.mean, y - 0.08, xerr=e.half, color="black", capsize=3, linewidth=1.4)
                axis.plot(e.mean, y - 0.08, "D", color="black", markersize=5)
            reach.append(max(abs(e.mean) + (e.half or 0.0), *map(abs, part)))
        squeezed = squeeze(axis, [d for part in found for d in part], reach) or squeezed
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


def squeeze(axis: Axes, found: Sequence[float], reach: Sequence[float]) -> bool:
    """Where a few methods are far from the others, make the x axis linear as far as half of them reach at least, and
    logarithmic beyond. `found` are the differences, `reach` how far from zero each method's go, interval included."""
    middle = float(np.median([r for r in reach if r] or [0.0]))
    if not middle or max(reach) <= 20 * middle:
        return False
    power = 10.0 ** math.floor(math.log10(middle))
    linear, linear_decades = float(f"{math.ceil(middle / power) * power:.1g}"), 1.5
    axis.set_xscale("symlog", linthresh=linear, linscale=linear_decades)
    decades = sum(math.log10(max(linear, end) / linear) + linear_decades for end in (max(found), -min(found)))
    apart = 1 if decades <= DECADES_WITH_ROOM else 2
    ends = [s * linear * 10**k for k in range(0, 7, apart) if linear * 10**k <= 1.2 * max(reach) for s in (-1, 1)]
    shown = [0.0, *(x for x in ends if min(found) <= x <= max(found) or abs(x) == linear)]
    axis.set_xticks(shown, [f"{x:g}".replace("-", MINUS) for x in shown], minor=False)
    axis.minorticks_off()
    return True


def without_penalty(run: Finished, groups: Groups) -> str | None:
    """The method that replays the same and has no penalty."""
    recipe = {**run.config["recipe"], "penalty": None}
    return next((name for name, group in groups.items() if group[0].config["recipe"] == recipe), None)


def sweeps(groups: Groups) -> dict[str, dict[float, Sequence[Finished]]]:
    """Families of methods that differ in lam only, with two or more of it: their runs by lam."""
    found: dict[str, dict[float, Sequence[Finished]]] = {}
    for group in groups.values():
        if group[0].lam is not None:
            found.setdefault(group[0].family, {})[group[0].lam] = group
    return {family: dict(sorted(runs.items())) for family, runs in found.items() if len(runs) > 1}


def lam_sweep(groups: Groups, name: str) -> Drawing | None:
    """Average FID and forgetting against lam: a row of panels a family."""
    found = sweeps(groups)
    if not found:
        return None
    figure, axes = plt.subplots(
        len(found), 2, figsize=(10, 2.9 * len(found) + 0.3), squeeze=False, layout="constrained"
    )
    for row, (family, runs) in zip(axes, found.items(), strict=True):
        plain = without_penalty(next(iter(runs.values()))[0], groups)
        place = places(list(runs))
        for axis, column in zip(row, HEADLINE, strict=True):
            if plain is None:
                axis.plot([], [], " ", label="no run of this replay without a penalty")
            elif reference := values(groups[plain], column.key):
                axis.axhspan(
                    min(reference.values()), max(reference.values()), color=COLOURS[1], alpha=0.15, linewidth=0
                )
                mean = float(np.mean([*reference.values()]))
                axis.axhline(mean, color=COLOURS[1], linestyle="--", label=f"no penalty: {plain}")
            by_lam = {lam: list(values(group, column.key).values()) for lam, group in runs.items()}
            for lam, dots in by_lam.items():
                axis.plot([place[lam]] * len(dots), dots, "o", color=COLOURS[0], markersize=4, alpha=0.5)
            measured = [lam for lam, dots in by_lam.items() if dots]
            means = [float(np.mean(by_lam[lam])) for lam in measured]
            axis.plot([place[lam] for lam in measured], means, color=COLOURS[0], label="mean over seeds")
            axis.set_xscale("log")
            axis.set_xticks([place[lam] for lam in runs], [f"{lam:g}" for lam in runs], fontsize=8)
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
    return drawing(name, figure, f"Average FID and forgetting against lam for {len(found)} methods.", text)


def places(lams: Sequence[float]) -> dict[float, float]:
    """Where each lam stands on a log axis: 0 and inf a factor of 10 outside of the others."""
    inner = [lam for lam in lams if 0 < lam < float("inf")] or [1.0]
    return {lam: min(inner) / 10 if lam == 0 else min(lam, max(inner) * 10) for lam in lams}


# Fisher matrices and data sets

SHOWN_TASKS = 6  # up to which a cell has room for its number
FISHER_PANELS = (  # key, title, limit, digits
    ("kappa", "κ", -math.inf, 3),
    ("rho", f"ρ (box: below {LOW_RHO:g})", LOW_RHO, 2),
    ("signal_share", f"signal share (box: below {LOW_SIGNAL:g})", LOW_SIGNAL, 2),
)


def fisher(rows: Mapping[str, Sequence[Sequence[Row]]], name: str) -> Drawing | None:
    """kappa, rho and signal share of every method and task, means over seeds."""
    known = [
        column for column in FISHER_PANELS if any(mean_of(p, column[0]) is not None for t in rows.values() for p in t)
    ]
    shown = {m: t for m, t in rows.items() if any(mean_of(p, column[0]) is not None for p in t for column in known)}
    if not shown:
        return None
    tasks = max(row["task"] for parts in shown.values() for part in parts for row in part)
    size = (2.6 + 2.5 * len(known), rows_height(list(shown)))
    figure, axes = plt.subplots(1, len(known), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (key, title, limit, digits) in zip(axes[0], known, strict=True):
        table = np.full((len(shown), tasks), np.nan)
        for i, parts in enumerate(shown.values()):
            for part in parts:
                found = mean_of(part, key)
                table[i, part[0]["task"] - 1] = np.nan if found is None else found
        axis.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, j in zip(*np.nonzero(np.isfinite(table)), strict=True):
            if tasks <= SHOWN_TASKS:
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
    name_rows(axes[0, 0], list(shown))
    text = "Each task's Fisher matrix, means over seeds, no units; dark is 0, light is 1. Orange box: below the limit."
    return drawing(name, figure, f"Heatmaps of kappa, rho and signal share for {len(shown)} methods.", text)


def across(scores: Mapping[str, Mapping[str, Mapping[int, float]]], data: Sequence[str], name: str) -> Drawing:
    """Normalised scores, one row a method, a marker a data set."""
    figure, axis = plt.subplots(figsize=(9, rows_height(list(scores), 0.2 * len(data) + 0.15)), layout="constrained")
    step = 0.8 / len(data)
    for k, part in enumerate(data):
        first = True
        for y, found in enumerate(scores.values()):
            if part not in found:
                continue
            e = seeds.estimate(list(found[part].values()))
            at = y - 0.4 + step * (k + 0.5)
            axis.plot(
                list(found[part].values()), [at] * e.n, ".", color=COLOURS[k % len(COLOURS)], alpha=0.4, markersize=5
            )
            axis.errorbar(
                e.mean,
                at,
                xerr=e.half,
                color=COLOURS[k % len(COLOURS)],
                capsize=2.5,
                marker=MARKERS[k % 7],
                markersize=5.5,
                label=part if first else None,
            )
            first = False
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
    return drawing(name, figure, f"Normalised scores of {len(scores)} methods on {len(data)} data sets.", text)
