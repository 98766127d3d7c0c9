"""The pictures of a regime: training until it no longer helps, gain against precision, forgetting against movement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from crl_diffusion.config.spelling import parse_method
from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.canvas import COLOURS, GREY, MARKERS, Drawing, drawing, plain_log
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .definitions import BASELINE, CURVE
from .runs import Result, Runs


def training(runs: Runs, name: str) -> Drawing | None:
    """Average FID and forgetting of the baseline against steps, with a constant and a one-cycle rate; None where the
    regime has one number of steps, or no run."""
    if not runs.regime.curve:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    empty = True
    steps = sorted({*runs.regime.curve, runs.regime.common["steps"]})
    for setting, colour, marker in zip(CURVE, COLOURS, MARKERS, strict=False):
        results = {
            n: [r for seed in runs.regime.curve_seeds if (r := runs.result(runs.curve_run(setting, n, seed)))]
            for n in steps
        }
        done = [n for n in steps if results[n]]
        empty &= not done
        for axis, measure in zip(axes, ("average_fid", "forgetting"), strict=True):
            for n in done:
                values = [getattr(result, measure) for result in results[n]]
                axis.plot([n] * len(values), values, marker, color=colour, markersize=4, alpha=0.4)
            means = [seeds.estimate([getattr(r, measure) for r in results[n]]).mean for n in done]
            axis.plot(done, means, color=colour, marker=marker, label=f"{setting} rate")
    for axis, title in zip(axes, ("average FID", "forgetting, ÷ (T − 1)"), strict=True):
        axis.set_xscale("log")
        axis.set_xticks(steps, [f"{n:,}" for n in steps])
        axis.minorticks_off()
        axis.set_xlabel("steps a task (log scale)")
        axis.set_ylabel(f"{title} (lower is better)")
    plain_log(axes[0])
    axes[1].axhline(0, color=GREY, linewidth=1, linestyle="--")
    axes[0].legend(frameon=False)
    if empty:
        plt.close(figure)
        return None
    count = len(runs.regime.curve_seeds)
    text = "Distillation alone, " + ("one seed." if count == 1 else f"{count} seeds. Lines: their means.")
    return drawing(name, figure, "Average FID and forgetting of distillation alone against training steps.", text)


class Kind(NamedTuple):
    """Methods that share a colour and a marker in a scatter plot."""

    name: str
    colour: str
    marker: str


KINDS = {
    "none": Kind("no penalty", COLOURS[6], "s"),
    "mean": Kind("mean gradient (rank 1)", COLOURS[0], "o"),
    "random": Kind("random direction", COLOURS[1], "D"),
    "damping": Kind("mean gradient in v only", "#7A5195", "*"),
    "signs": Kind("mean gradient with random signs", COLOURS[5], "X"),
    "top": Kind("top eigenvector", COLOURS[2], "^"),
    "several": Kind("rank 10 or 8 bands", COLOURS[3], "v"),
    "diagonal": Kind("diagonal", COLOURS[4], "P"),
}


def kind(method: str) -> Kind:
    penalty = parse_method(method).penalty
    if penalty is None:
        return KINDS["none"]
    if penalty.fisher == "diagonal":
        return KINDS["diagonal"]
    if penalty.mode in KINDS:
        return KINDS[penalty.mode]
    if penalty.rank > 1 or penalty.bands > 1:
        return KINDS["several"]
    return KINDS[penalty.direction]


class Point(NamedTuple):
    """One method in one setting: results by seed of it, and of the baseline in the constant setting."""

    label: str
    method: str
    pairs: Sequence[tuple[Result, Result]]
    final: bool

    @property
    def constant(self) -> bool:
        """Whether the rate is constant within a task and the weights are not averaged."""
        settings = self.pairs[0][0].run.settings
        return settings["lr_schedule"] == "constant" and not settings["ema"]

    def mean(self, value: str, difference: bool) -> float:
        numbers = [getattr(a, value) - difference * getattr(b, value) for a, b in self.pairs]
        return seeds.estimate(numbers).mean


def points(runs: Runs) -> list[Point]:
    """All methods, settings and lams, with Adam: those of the tuning seed, and the final ones."""
    found: dict[str, Point] = {}
    for final in (False, True):
        by_part: dict[tuple[str, str], list[Result]] = {}
        for result in runs.results.values():
            stage, _, setting = result.run.path.parent.name.partition("-")
            if stage == ("final" if final else "tuning") and result.run.settings["optimizer"] == "adam":
                by_part.setdefault((setting, result.run.method), []).append(result)
        base = {result.run.seed: result for result in by_part.get(("constant", BASELINE), [])}
        for (setting, method), results in by_part.items():
            usable = method not in ("fine-tune", "joint")
            pairs = [(result, base[result.run.seed]) for result in results if result.run.seed in base and usable]
            if pairs:
                found[f"{final} {setting} {method}"] = Point(f"{setting} {method}", method, pairs, final)
    return [*found.values()]


Axis = tuple[str, bool, str]  # a value of results, whether that of distillation alone is subtracted, and a label
MARKED = (
    "Large markers: means over the final seeds. Small ones: every lam that was tried, on the tuning seed and "
    "validation images. Filled: the same constant rate throughout; hollow: other rates, EMA, one-cycle."
)


def scatter(every: Sequence[Point], x: Axis, y: Axis) -> tuple[Figure, Axes]:
    """One marker a method, setting and lam."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    named: dict[str, Kind] = {}
    for point in every:
        look = kind(point.method)
        named[look.name] = look
        axis.plot(
            point.mean(*x[:2]),
            point.mean(*y[:2]),
            look.marker,
            markersize=9 if point.final else 5,
            markerfacecolor=look.colour if point.label.startswith("constant ") else "none",
            markeredgecolor=look.colour,
            alpha=1 if point.final else 0.5,
        )
    for look in named.values():
        axis.plot([], [], look.marker, color=look.colour, label=look.name)
    axis.axhline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.set_xlabel(x[2])
    axis.set_ylabel(y[2])
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, axis


def leave_out_far(axis: Axes, every: Sequence[Point], y: Axis) -> str:
    """End the axis as far above distillation alone as the best lies below it, so that strengths which are far too
    large leave room for the others. Returns what to say of the markers that are higher still."""
    alone = max(point.mean(*y[:2]) for point in every if point.label == f"constant {BASELINE}")
    best = axis.dataLim.y0
    top = alone + (1 + axis.margins()[1]) * (alone - best)
    higher = sum(point.mean(*y[:2]) > top for point in every)
    if not higher:
        return ""
    axis.set_ylim(best - axis.margins()[1] * (top - best), top)
    return f" Above the picture: {higher}."


def gain_and_rate(runs: Runs, name: str) -> Drawing | None:
    every = points(runs)
    constant = [point for point in every if point.constant]
    if not constant:
        return None
    gain: Axis = ("average_fid", True, "average FID less that of distillation alone (below 0 is a gain)")
    rate: Axis = ("log_rate", True, "change of Adam's effective rate, mean log (lr / √v); −0.7: half of it")
    figure, axis = scatter(constant, rate, gain)
    for label, style in (("one-cycle gd", ":"), ("ema gd", "-.")):
        for point in every:
            if point.label == label and point.final:
                axis.axhline(point.mean(*gain[:2]), color=COLOURS[6], linestyle=style, linewidth=1, label=label)
    axis.axvline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)
    higher = leave_out_far(axis, constant, gain)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    text = (
        "Change of average FID against change of Adam's effective rate, both less distillation alone, at constant "
        f"rates without an average. Lines: distillation alone with one-cycle and with an EMA. {MARKED}{higher}"
    )
    alt = "Scatter plot of the change of average FID against that of Adam's effective rate, one marker per method."
    return drawing(name, figure, alt, text)


FARTHER = 3.0  # times as far as any final run: with such a strength, training has diverged


def forgetting_and_movement(runs: Runs, name: str) -> Drawing | None:
    moved: Axis = ("displacement", False, "distance that the weights move in a task, mean over tasks (log scale)")
    forgetting: Axis = ("forgetting", False, "forgetting, ÷ (T − 1) (lower is better)")
    every = points(runs)
    reach = FARTHER * max((point.mean(*moved[:2]) for point in every if point.final), default=float("inf"))
    near = [point for point in every if point.mean(*moved[:2]) <= reach]
    if not near:
        return None
    figure, axis = scatter(near, moved, forgetting)
    plain_log(axis, "x")
    higher = leave_out_far(axis, near, forgetting)
    text = f"Forgetting against the distance that the weights move in a task, a mean over tasks. {MARKED}{higher}"
    if gone := len(every) - len(near):
        text += (
            f" Left out: {gone} with which the weights moved more than {FARTHER:g} times as far as in any final run."
        )
    alt = "Scatter plot of forgetting against the movement of the weights, one marker per method."
    return drawing(name, figure, alt, text)


def groups_of(runs: Runs) -> Mapping[str, Mapping[int, Result]]:
    """The results of each arm by seed."""
    groups: dict[str, dict[int, Result]] = {}
    for arm in runs.regime.arms:
        for seed in runs.regime.seeds:
            wanted = runs.final_run(arm, seed)
            if wanted is not None and (result := runs.result(wanted)) is not None:
                groups.setdefault(arm.label, {})[seed] = result
    return groups
