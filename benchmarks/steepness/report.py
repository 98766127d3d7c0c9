"""The page and the picture of a record. Pairs of a run are averaged first; the replicate is the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.canvas import COLOURS, GREY, MARKERS, Drawing, drawing
from crl_diffusion.reporting.tables import MINUS, NONE, Sheet
from crl_diffusion.reporting.tables import markdown as table
from matplotlib.ticker import LogLocator
from scipy import stats

from .displacement import STEP
from .measurement import ESTIMATES

SCHEDULES = {"constant": "constant rate", "one-cycle": "one-cycle"}
MEASURED = {"rise": "measured rise, training images", "held_out_rise": "measured rise, held-out images"}
PREDICTED = {
    "first_order": "first order, g · δ",
    "quadratic": "first order + curvature",
    "curvature": "curvature along δ, ½ δᵀHδ",
    "gauss_newton": "Gauss-Newton, ½ δᵀGδ",
    "fisher": "Fisher, ½ δᵀFδ",
    "rank1": "rank 1",
    "rank10": "rank 10",
    "bands8": "8 bands",
    "diagonal": "diagonal",
}
DISPLACEMENT = {"displacement_sq": "square of the displacement, |δ|²"}
DRAWN = ("curvature", "gauss_newton", "fisher", *ESTIMATES)
AT_THE_END = {
    "loss": "loss, training images",
    "held_out_loss": "loss, held-out images",
    "trace": "trace of F",
    "mean_gradient_sq": "square norm of the mean gradient",
    "kappa": "kappa",
    "rho": "rho of rank 1",
    "signal_share": "signal share",
}

Row = Mapping[str, Any]
Rows = Sequence[Row]


# Numbers


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", MINUS)


def cell(values: Sequence[float]) -> str:
    """The mean and its 95 % t interval."""
    if not values:
        return NONE
    estimate = seeds.estimate(values)
    text = short(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{short(estimate.low)}, {short(estimate.high)}]"


def average(rows: Rows, key: str) -> float:
    """Over the pairs or tasks of a run; NaN where one of them has no such number."""
    return float(np.mean([math.nan if row[key] is None else row[key] for row in rows]))


def ratio(rows: Rows, part: str, whole: str) -> float:
    """Of two means over the pairs of a run; NaN unless the second is above 0."""
    below = average(rows, whole)
    return average(rows, part) / below if below > 0 else math.nan


def rank_correlation(pairs: Rows, key: str) -> float:
    """Spearman's, with the measured rise; NaN below three pairs."""
    if len(pairs) < 3:
        return math.nan
    return float(stats.spearmanr([pair[key] for pair in pairs], [pair["rise"] for pair in pairs]).statistic)


def schedules(runs: Rows) -> dict[str, str]:
    """The learning rates of these runs, with their names."""
    return {key: name for key, name in SCHEDULES.items() if any(run["lr_schedule"] == key for run in runs)}


def of_schedule(runs: Rows, schedule: str) -> Rows:
    return [run for run in runs if run["lr_schedule"] == schedule]


def comparison(runs: Rows, value: Callable[[Row], float]) -> list[str]:
    """Cells: a number of each run, by learning rate, and the paired difference where there are two rates. Runs whose
    number is not defined are left out, and counted."""
    cells, by_schedule = [], []
    for schedule in schedules(runs):
        values = {run["seed"]: value(run) for run in of_schedule(runs, schedule)}
        defined = {seed: number for seed, number in values.items() if not math.isnan(number)}
        missing = f" ({len(defined)} of {len(values)} seeds)" if len(defined) < len(values) else ""
        cells.append(cell([*defined.values()]) + missing)
        by_schedule.append(defined)
    if len(by_schedule) == 2:
        differences = [*seeds.paired(*by_schedule).values()]
        test = seeds.sign_flip(differences)
        cells += [cell(differences), NONE if test is None else f"{test.p:.2g}"]
    return cells


def sheet(runs: Rows, names: Mapping[str, str], value: Callable[[Row, str], float], caption: str) -> Sheet:
    """A table with a row for each key of `names`."""
    titles = [*schedules(runs).values()]
    head = ["", *titles, *(("difference", "p") if len(titles) == 2 else ())]
    body = [[name, *comparison(runs, lambda run, key=key: value(run, key))] for key, name in names.items()]
    return Sheet(head, body, caption)


# Tables


def rises(runs: Rows) -> Sheet:
    text = "Means over the pairs of a run. A right prediction equals the measured rise."
    names = {**MEASURED, **PREDICTED, **DISPLACEMENT}
    return sheet(runs, names, lambda run, key: average(run["pairs"], key), text)


def shares(runs: Rows) -> Sheet:
    text = (
        "The quadratic of each estimate over that of the exact Fisher matrix along the same δ, as a ratio of means "
        "over the pairs of a run. Estimates have samples of their own, so their share may be above 1. That of "
        "Gauss-Newton is the lam at which the penalty of the exact Fisher matrix has the scale of G."
    )
    names = {key: PREDICTED[key] for key in (*ESTIMATES, "gauss_newton")}
    return sheet(runs, names, lambda run, key: ratio(run["pairs"], key, "fisher"), text)


def ratios(runs: Rows) -> Sheet:
    text = (
        "Each prediction over the measured rise on training images, as a ratio of means over the pairs of a run; not "
        "defined for a run whose mean rise is not above 0. A Fisher matrix is no Hessian: compare its ratios with one "
        "another, not with 1."
    )
    return sheet(runs, PREDICTED, lambda run, key: ratio(run["pairs"], key, "rise"), text)


def orders(runs: Rows) -> Sheet:
    names = schedules(runs)
    pooled = {name: [pair for run in of_schedule(runs, key) for pair in run["pairs"]] for key, name in names.items()}
    if len(names) == 2:
        pooled["both"] = [pair for run in runs for pair in run["pairs"]]
    body = []
    for key, name in {**PREDICTED, **DISPLACEMENT}.items():
        correlations = [rank_correlation(pairs, key) for pairs in pooled.values()]
        within = comparison(runs, lambda run, key=key: rank_correlation(run["pairs"], key))[: len(names)]
        body.append([name, *(NONE if math.isnan(x) else short(x) for x in correlations), *within])
    head = ["", *(f"all pairs, {name}" for name in pooled), *(f"within a run, {name}" for name in names.values())]
    text = (
        "Spearman's rank correlation of each prediction with the measured rise on training images: 1 if it orders the "
        "pairs rightly. First over all pairs of all seeds: pairs of a run are not independent, so there is no "
        "interval. Then within each run, with mean and interval over seeds. |δ|² only knows how far the weights have "
        "moved."
    )
    return Sheet(head, body, text)


def at_the_end(runs: Rows) -> Sheet:
    text = (
        "At the end of a task, means over the tasks of a run but the last. Kappa, and the square norm of the mean "
        "gradient, which is kappa times the trace, are unbiased, so they may be below 0."
    )
    return sheet(runs, AT_THE_END, lambda run, key: average(run["tasks"], key), text)


# Page and picture


def instability(runs: Rows) -> float:
    """The largest difference between the curvatures at the step and at twice the step, relative to the first."""
    pairs = [pair for run in runs for pair in run["pairs"]]
    return max(abs(pair["curvature_at_twice_the_step"] / pair["curvature"] - 1) for pair in pairs)


def markdown(record: Row, drawn: Drawing) -> str:
    runs = record["runs"]
    parts = [
        "# Does the penalty's quadratic predict what later tasks do to the loss of old ones?",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}, torch "
        f"{record['torch']}. {len(runs)} runs with {len(runs[0]['pairs'])} pairs of a task and a later one each, "
        f"`crl-diffusion train {record['options']}`.",
        "θ are the weights at the end of a task, and δ is the difference between the weights at the end of a later "
        f"task and θ. The loss L is the mean over {record['samples']:,} draws of an image of the old task, a timestep "
        "and noise, the same for all weights, in float64. The measured rise is L(θ + δ) − L(θ). Predictions of it are "
        "the first-order term; the curvature of L along δ, with its Hessian H; the sum of both; and the quadratics of "
        "the Gauss-Newton matrix G and of the empirical Fisher matrix F. Rank 1, rank 10, 8 bands and diagonal are the "
        f"values of the trainer's penalties at lam = 1, estimated at θ from {record['fisher_samples']:,} samples. The "
        f"curvature is a second difference with the step {STEP:g} δ; with twice that step it differs by "
        f"{short(100 * instability(runs))} % at most.",
        "Brackets are 95 % t intervals over seeds; pairs and tasks of a run are averaged first. Differences: constant "
        "rate minus one-cycle, paired by seed, with p of the exact two-sided sign-flip test.",
    ]
    tables = {
        "Measured and predicted rise": rises,
        "Relative to the Fisher matrix along the displacement": shares,
        "Predicted over measured": ratios,
        "Order of the pairs": orders,
        "The old task's gradient": at_the_end,
    }
    for title, make in tables.items():
        parts += [f"## {title}", table(make(runs))]
    parts += [f"![{drawn.alt}]({drawn.name}.png)", drawn.caption]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def picture(record: Row) -> Drawing:
    """Each quadratic against the measured rise, one marker a pair."""
    names = schedules(record["runs"])
    figure, (axes,) = plt.subplots(
        1, len(names), figsize=(2.4 + 4.2 * len(names), 4.6), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    hidden = total = 0
    for axis, (schedule, name) in zip(axes, names.items(), strict=True):
        pairs = [pair for run in of_schedule(record["runs"], schedule) for pair in run["pairs"]]
        for key, colour, marker in zip(DRAWN, COLOURS, MARKERS, strict=True):
            points = np.array([(pair["rise"], pair[key]) for pair in pairs])
            positive = points[(points > 0).all(1)]
            hidden, total = hidden + len(points) - len(positive), total + len(points)
            style = {"color": colour, "markersize": 5, "alpha": 0.65, "markeredgewidth": 0}
            axis.plot(*positive.T, marker, label=PREDICTED[key], **style)
        axis.set(xscale="log", yscale="log", xlabel="measured rise of the old task's loss")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(name, fontsize=10)
    limits = axes[0].axis()
    for axis in axes:
        axis.axline((1, 1), (10, 10), color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes[0].axis(limits)  # the line would extend them to its points
    axes[0].set_ylabel("predicted by the quadratic")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    text = (
        "Each quadratic against the measured rise of the old task's loss, one marker for each pair of a task and a "
        "later one of each seed; on the dashed line they agree."
        + (f" {hidden} of {total} points have a value that is not above 0, and are not shown." if hidden else "")
    )
    alt = "Scatter plots, predicted against measured rise of the loss on logarithmic axes, one panel per learning rate."
    return drawing("steepness", figure, alt, text)
