"""One optimization step: learning rates, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import predict
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.methods.penalties import PenaltyState
from crl_diffusion.methods.regression import NoisedBatch


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: a cosine up to `peak` over the first tenth, then a cosine down to (nearly) zero."""
    rise = max(1, steps // 10)
    if step < rise:
        return peak * 0.5 * (1 - math.cos(math.pi * (step + 1) / rise))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


LR_SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "one-cycle": one_cycle,
    "constant": lambda step, steps, lr: lr,
}


class StepResult(NamedTuple):
    """The result of one step."""

    losses: Tensor  # (B,), weighted, of this process's samples
    norm: Tensor  # (), of the gradient before clipping
    moved: bool  # whether the optimizer took its step


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: NoisedBatch,
    penalty: PenaltyState | None,
    lr: float,
    clip: float,
    precision: Precision,
) -> StepResult:
    """Forward, weighted squared errors, backward, sum over processes, penalty, clip, step.

    The weights sum to the same whatever the number of processes, so gradients are summed over them and not averaged.
    """
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    with precision.autocast():
        prediction = predict(model, batch.noised, batch.t, batch.label)
    losses = batch.weight * noising.per_sample_loss(prediction, batch.target)
    precision.scaled(losses.sum()).backward()
    processes.sum_gradients(model)
    precision.unscale_(optimizer)
    if penalty is not None:
        penalty.after_backward()
    if clip:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    moved = precision.step(optimizer)
    if penalty is not None and moved:
        penalty.after_step(lr, optimizer)
    return StepResult(losses.detach(), norm.detach(), moved)
