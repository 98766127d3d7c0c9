"""The pictures of a diagnosis, each as PNG and SVG. Only this module needs matplotlib."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .findings import Findings
from .spectrum import IntervalEstimate, Spectrum
from .verdict import ENOUGH, short

# Okabe and Ito's palette, which colour-blind readers can distinguish, and markers for prints in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LAYER_INCHES = 0.17

Choice = Callable[[Spectrum], IntervalEstimate]


def write(findings: Findings, folder: Path) -> list[Path]:
    """Writes all pictures to ``folder``; returns their paths."""
    figures = {
        "collinearity": _collinearity(findings),
        "spectrum": _spectrum(findings),
        "frobenius_error": _frobenius(findings),
        "layers": _layers(findings),
        "cosines": _cosines(findings),
    }
    paths = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            # Without the date, the same numbers give the same file.
            figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)
            paths.append(path)
    return paths


def _against_t(axis: Axes, findings: Findings, curves: Sequence[tuple[str, Choice]]) -> None:
    """Curves with their intervals over single timesteps; t uniform as dashed lines of the same colours."""
    t = list(findings.at)
    for i, (label, choose) in enumerate(curves):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        estimates = [choose(s) for s in findings.at.values()]
        value, low, high = (np.array([getattr(e, part) for e in estimates]) for part in ("value", "low", "high"))
        axis.plot(t, value, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
        if np.isfinite(low).all():
            axis.fill_between(t, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.axhline(choose(findings.uniform).value, color=colour, linestyle=(0, (2 + i, 2)), linewidth=1.1)
    axis.set_xlim(0, findings.num_timesteps)
    axis.set_xlabel("timestep t")
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    if findings.snr:
        top = axis.twiny()
        top.set_xlim(axis.get_xlim())
        gap = 0.045 * findings.num_timesteps  # labels nearer than this would touch
        labelled = [x for i, x in enumerate(t) if all(abs(x - other) > gap for other in t[:i])]
        top.set_xticks(labelled, [short(findings.snr[x]) for x in labelled], fontsize=8)
        top.set_xlabel("signal-to-noise ratio", fontsize=9)


def _legend(axis: Axes) -> None:
    axis.plot([], [], color="#555555", linestyle="--", linewidth=1.1, label="dashed: t uniform")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _new(width: float = 9.6, height: float = 4.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _collinearity(findings: Findings) -> Figure:
    figure, axis = _new()
    _against_t(
        axis,
        findings,
        [
            ("top eigenvector, in sample\n(λ₁ / trace)", lambda s: s.lambda1_share),
            ("top eigenvector, held out", lambda s: s.held_out[1]),
            ("mean gradient, held out (ρ)", lambda s: s.held_out_mean),
            ("|μ|² / trace, unbiased (κ)", lambda s: s.kappa),
        ],
    )
    axis.axhline(ENOUGH, color="#888888", linewidth=0.8, linestyle=":", label="enough")
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1)
    axis.set_ylabel("share of the trace of F")
    axis.set_title("How much of the Fisher lies along one direction", fontsize=12)
    _legend(axis)
    return figure


def _spectrum(findings: Findings) -> Figure:
    """Left: eigenvalues in sample. Right: held-out shares of the top k."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = [*((f"t = {t}", s) for t, s in findings.at.items()), ("t uniform", findings.uniform)]
    shades = _shades(len(findings.at))
    for i, (label, s) in enumerate(places):
        last = i == len(places) - 1
        style: dict[str, Any] = {"color": "black" if last else shades[i], "linewidth": 2.2 if last else 1.4}
        style |= {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 4, "linestyle": "--" if last else "-"}
        left.plot(range(1, len(s.eigenvalues) + 1), s.eigenvalues, label=label, **style)
        ranks = list(s.held_out)
        right.plot(ranks, [s.held_out[k].value for k in ranks], label=label, **style)
        right.fill_between(
            ranks,
            [s.held_out[k].low for k in ranks],
            [s.held_out[k].high for k in ranks],
            color=style["color"],
            alpha=0.1,
            linewidth=0,
        )
    left.set_yscale("log")
    left.set_ylim(bottom=max(left.get_ylim()[0], 1e-5))
    left.set_xlabel("eigenvalue, by size")
    left.set_ylabel("share of the trace of F")
    left.set_title("Eigenvalues of F, in sample", fontsize=11)
    if findings.bands is not None:
        b = findings.bands
        right.errorbar(
            [len(findings.at)],
            [b.value],
            yerr=[[b.value - b.low], [b.high - b.value]],
            color=_COLOURS[1],
            marker="*",
            markersize=12,
            linestyle="none",
            label="t uniform, one direction\nat each timestep",
        )
    ranks = list(findings.uniform.held_out)
    right.set_xscale("log", base=2)
    right.set_xticks(ranks, [str(k) for k in ranks])
    right.axhline(ENOUGH, color="#888888", linewidth=0.8, linestyle=":")
    right.set_ylim(0, 1)
    right.set_xlabel("number of directions k")
    right.set_ylabel("share of the trace of F")
    right.set_title("Held out: what the top k directions hold", fontsize=11)
    for axis in (left, right):
        axis.grid(color="#e4e4e4", linewidth=0.7)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.92, count)]


def _frobenius(findings: Findings) -> Figure:
    ranks = list(findings.uniform.error)
    curves: list[tuple[str, Choice]] = [
        ("diagonal", lambda s: s.error_diagonal),
        ("rank 1, mean gradient", lambda s: s.error_mean),
        ("rank 1, top eigenvector", lambda s: s.error[1]),
    ]
    for k in [k for k in ranks if k > 1]:
        curves.append((f"rank {k}", lambda s, k=k: s.error[k]))  # type: ignore[misc]
    figure, axis = _new()
    _against_t(axis, findings, curves)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("relative Frobenius error")
    axis.set_title("How far each form of the Fisher is from F, held out", fontsize=12)
    _legend(axis)
    return figure


def _layers(findings: Findings) -> Figure:
    """Layer by timestep: share along the top eigenvector, held out and in sample."""
    names = list(findings.layers)
    columns = [*map(str, findings.at), "uniform"]
    figure = Figure(figsize=(11.5, 1.9 + _LAYER_INCHES * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    choices: tuple[tuple[str, Choice], ...] = (
        ("held out", lambda s: s.held_out[1]),
        ("λ₁ / trace, in sample", lambda s: s.lambda1_share),
    )
    for axis, (title, choose) in zip(panels, choices, strict=True):
        values = np.array([[choose(findings.layers[name][c]).value for c in columns] for name in names])
        image = _heat(axis, values, columns, 0, 1, "viridis", text=6.5)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("timestep t")
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, ax=panels, label="share of the layer's trace", shrink=0.6)
    figure.suptitle("What the top eigenvector holds, layer by layer (grey: no gradient)", fontsize=12)
    return figure


def _cosines(findings: Findings) -> Figure:
    columns = [*map(str, findings.at), "uniform"]
    side = 2.6 + 0.5 * len(columns)
    figure, axis = _new(side + 0.8, side - 0.2)
    image = _heat(axis, np.array(findings.cosines), columns, -1, 1, "RdBu_r", text=8)
    axis.set_yticks(range(len(columns)), columns)
    axis.set_xlabel("timestep t")
    axis.set_ylabel("timestep t")
    axis.set_title("Cosines between mean gradients\n(grey: a mean that is lost in noise)", fontsize=11)
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def _heat(axis: Axes, values: Any, columns: Sequence[str], low: float, high: float, colours: str, text: float) -> Any:
    from matplotlib import colormaps

    image = axis.imshow(
        values, cmap=colormaps[colours].with_extremes(bad="#dddddd"), vmin=low, vmax=high, aspect="auto"
    )
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            red, green, blue = image.cmap(image.norm(value))[:3]
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=text, color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=45)
    return image
