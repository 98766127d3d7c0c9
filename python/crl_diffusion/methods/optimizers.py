"""The optimizers of a run by name, what a checkpoint holds of them, and Adam's denominator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.0, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=True),
}
# What each optimizer keeps of a parameter: step is a number, the others have the parameter's shape.
STATE = {"adam": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def new_optimizer(model: nn.Module, name: str = "adam") -> torch.optim.Optimizer:
    """A new optimizer of the weights that are trained now; the learning rate is set in every step."""
    return OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)


def adam_denominator(optimizer: torch.optim.Optimizer, parameter: Tensor, eps: float | None = None) -> Tensor:
    """sqrt(v / (1 - beta2^t)) + eps, in the shape of the parameter: Adam divides its step by it. v is the moving
    average of squared gradients after t steps; eps is the optimizer's unless given."""
    group, state = optimizer.param_groups[0], optimizer.state[parameter]
    correction = 1 - group["betas"][1] ** float(state["step"])
    denominator: Tensor = (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"] if eps is None else eps)
    return denominator
