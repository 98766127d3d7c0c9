"""Controls for experiments: the first-order term without the quadratic penalty, and random directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crl_kernels import LowRankFisher, LowRankHistory


class SlopesAlone:
    """The first-order term without the quadratic penalty: each step moves theta by -lr lam sum_k w_k s_k u_k.

    Without a training loss, each step of a decoupled penalty multiplies the distance to the shifted anchor along u_k by
    1 / (1 + lr lam a_k), so its pull fades. w_k fades in the same way, but once a task: every task that begins divides
    it by 1 + lam a_k (sum of a task's learning rates). It does not depend on the parameters.
    """

    def __init__(self, model: nn.Module, lam: float) -> None:
        self.parameters, self.lam = dict(model.named_parameters()), lam
        self.slopes = torch.zeros(0, dtype=torch.float64)  # w_k s_k
        self._pull: dict[str, Tensor] = {}  # sum_k w_k s_k u_k, by parameter

    def learn(self, history: LowRankHistory, fisher: LowRankFisher, task_lr: float) -> None:
        """Add the slopes of a task, whose terms are the history's last; `task_lr` is the sum of its learning rates."""
        assert fisher.slopes is not None
        slopes = torch.cat([self.slopes.to(fisher.slopes), fisher.slopes])
        self.set(history, slopes / (1 + self.lam * task_lr * history.curvatures))

    def set(self, history: LowRankHistory, slopes: Tensor) -> None:
        if slopes.shape != history.curvatures.shape:
            raise ValueError(f"{len(slopes)} slopes and {len(history)} terms")
        self.slopes = slopes.to(history.curvatures)
        pull = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.parameters.items()}
        for slope, direction in zip(self.slopes.tolist(), history.directions(), strict=True):
            for name, part in direction.items():
                pull[name].add_(part, alpha=slope)
        self._pull = {name: value.to(self.parameters[name].dtype) for name, value in pull.items()}

    @torch.no_grad()
    def step_(self, lr: float) -> None:
        for name, pull in self._pull.items():
            self.parameters[name].sub_(pull, alpha=lr * self.lam)


def along_random_directions(
    fisher: LowRankFisher, model: nn.Module, generator: torch.Generator, signs_only: bool = False
) -> LowRankFisher:
    """The same curvatures and slopes along random unit directions or, with `signs_only`, along the same directions with
    a random sign for every entry: they differ in direction as much, and every entry keeps its size."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    terms = len(fisher)
    drawn = {name: torch.randn(terms, *p.shape, generator=generator) for name, p in parameters.items()}
    if signs_only:
        history = LowRankHistory(model)
        history.append(fisher)
        own = history.directions()
        drawn = {name: noise.sign() * torch.stack([u[name] for u in own]).to(noise) for name, noise in drawn.items()}
    lengths = sum(d.flatten(1).double().square().sum(1) for d in drawn.values()).sqrt()
    directions = {
        name: (d / lengths.to(d.dtype).view(terms, *[1] * (d.dim() - 1))).to(parameters[name])
        for name, d in drawn.items()
    }
    return LowRankFisher(directions, fisher.curvatures, parameters, slopes=fisher.slopes, statistics=fisher.statistics)
