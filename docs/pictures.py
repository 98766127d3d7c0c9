"""Draws the pictures of the concepts' pages, with the library itself: `python docs/pictures.py`."""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

from crl_kernels import (
    DiagonalFisher,
    DiagonalHistory,
    LowRankFisher,
    LowRankHistory,
)

matplotlib.use("Agg")
FOLDER = Path(__file__).parent / "pictures"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "crl-kernels"}
OLD, NEW, PATH = "#3f51b5", "#9e9e9e", "#d84315"

ANCHOR = torch.tensor([0.0, 0.0], dtype=torch.float64)
NEW_OPTIMUM = torch.tensor([2.0, 1.0], dtype=torch.float64)
# Eigenvalues 10 and 0.2: nearly rank 1, and neither eigenvector is an axis.
DIRECTION = torch.tensor([0.6, 0.8], dtype=torch.float64)
OLD_HESSIAN = 10 * torch.outer(DIRECTION, DIRECTION) + 0.2 * torch.eye(2, dtype=torch.float64)
NEW_HESSIAN = torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64))
STRENGTHS = [0.0, *torch.logspace(-3, 3, 61, dtype=torch.float64).tolist()]


class Point(nn.Module):
    """A model whose only parameter is a point of the plane."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())


def histories_of(model: Point) -> dict[str, DiagonalHistory | LowRankHistory]:
    """The old task's Fisher, taken as its Hessian, in both forms."""
    anchor = {"theta": ANCHOR}
    diagonal = DiagonalHistory(model)
    diagonal.append(DiagonalFisher({"theta": OLD_HESSIAN.diagonal()}, anchor))
    rank_1 = LowRankHistory(model)
    curvature = (DIRECTION @ OLD_HESSIAN @ DIRECTION).reshape(1)
    rank_1.append(LowRankFisher({"theta": DIRECTION[None]}, curvature, anchor))
    return {"diagonal Fisher": diagonal, "rank-1 Fisher": rank_1}


def optima(model: Point, history: DiagonalHistory | LowRankHistory) -> Tensor:
    """Where new loss + penalty is lowest, for each strength: one Newton step, since both are quadratic."""
    points = []
    for lam in STRENGTHS:
        with torch.no_grad():
            model.theta.copy_(NEW_OPTIMUM)  # where the new loss has no gradient
        (force,) = torch.autograd.grad(history.penalty(lam), model.theta, create_graph=True)
        rows = [torch.autograd.grad(force[i], model.theta, retain_graph=True)[0] for i in range(2)]
        points.append(NEW_OPTIMUM - torch.linalg.solve(NEW_HESSIAN + torch.stack(rows), force.detach()))
    return torch.stack(points)


def quadratic(points: Tensor, hessian: Tensor, center: Tensor) -> Tensor:
    away = points - center
    return 0.5 * ((away @ hessian) * away).sum(-1)


def draw_penalties() -> pyplot.Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 5), sharex=True, sharey=True, layout="constrained")
    x, y = torch.meshgrid(torch.linspace(-1.2, 2.8, 200), torch.linspace(-1.4, 1.9, 200), indexing="xy")
    grid = torch.stack([x, y], -1).double()
    model = Point(NEW_OPTIMUM)
    for axis, (name, history) in zip(axes, histories_of(model).items(), strict=True):
        axis.contour(x, y, quadratic(grid, OLD_HESSIAN, ANCHOR), [0.25, 1, 4, 9, 16], colors=OLD, linewidths=0.8)
        axis.contour(x, y, quadratic(grid, NEW_HESSIAN, NEW_OPTIMUM), 6, colors=NEW, linewidths=0.6, linestyles=":")
        path = optima(model, history)
        axis.plot(*path.T, color=PATH, linewidth=2, label="optimum of new loss + penalty, λ from 0 to 1000")
        axis.plot(*path[-1], "o", color=PATH)
        axis.plot(*ANCHOR, "*", color=OLD, markersize=11, label="θ*, the old task's optimum (old loss in blue)")
        axis.plot(*NEW_OPTIMUM, "P", color="#616161", markersize=8, label="the new task's optimum (new loss in grey)")
        old, new = (
            float(quadratic(path[-1], hessian, center))
            for hessian, center in ((OLD_HESSIAN, ANCHOR), (NEW_HESSIAN, NEW_OPTIMUM))
        )
        axis.set_title(f"{name}\nλ = 1000: old loss {old:.2f}, new loss {new:.2f}", fontsize=9)
        axis.set_aspect("equal")
        axis.set_xlabel("θ₁")
    axes[0].set_ylabel("θ₂")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    return figure


def drift_after(stiffness: float, steps: int, decoupled: bool) -> list[float]:
    """The drift along one direction of a model that only the penalty moves; it starts at 1."""
    model, lr = Point(DIRECTION), 0.1
    history = histories_of(model)["rank-1 Fisher"]
    lam = stiffness / (lr * float(history.curvatures[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    drifts = [float(history.drift()[0])]
    for _ in range(steps):
        optimizer.zero_grad()
        if decoupled:
            history.decoupled_step_(lam, lr)
        else:
            history.add_penalty_grad_(lam)
            optimizer.step()
        drifts.append(float(history.drift()[0]))
    return drifts


def draw_stability() -> pyplot.Figure:
    figure, (one, many) = pyplot.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
    stiffness = torch.linspace(0, 4, 41).tolist()
    for decoupled, color, name in ((False, NEW, "gradient, plain SGD"), (True, PATH, "decoupled")):
        one.plot(stiffness, [drift_after(s, 1, decoupled)[-1] for s in stiffness], color=color, linewidth=2, label=name)
    one.axhspan(-3.2, -1, color="#fbe9e7", zorder=0)
    one.text(0.1, -2, "diverges: the drift grows\nwith every step", fontsize=8, va="center")
    one.set(xlabel="stiffness, lr · λ · a", ylabel="drift after one step / before", xlim=(0, 4), ylim=(-3.2, 1.1))
    one.axhline(0, color="black", linewidth=0.5)
    one.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.02))
    draw_steps(many)
    return figure


def draw_steps(axis: Axes) -> None:
    for s, style in ((0.1, "-"), (1.8, "--"), (2.1, ":")):
        for decoupled, color in ((False, "#616161"), (True, PATH)):
            axis.plot(
                drift_after(s, 12, decoupled),
                style,
                color=color,
                label=f"{'decoupled' if decoupled else 'gradient'}, stiffness {s}",
            )
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="step", ylabel="drift, u·θ − b", ylim=(-3.3, 3.3))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def main(folder: Path = FOLDER) -> list[Path]:
    """Draws all pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in (("penalties", draw_penalties), ("stability", draw_stability)):
            paths.append(folder / f"{name}.svg")
            figure = draw()
            figure.savefig(paths[-1], metadata={"Date": None}, bbox_inches="tight")
            pyplot.close(figure)
    return paths


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(path)
