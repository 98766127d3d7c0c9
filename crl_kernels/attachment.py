"""A history's penalty inside anyone's optimizer, by step hooks: two lines in a trainer that someone else wrote.

Hooks run once for each real step: under gradient accumulation, and when a GradScaler skips a step, as often as the
optimizer moves. A GradScaler hands some optimizers (``fused=True``) gradients that are still scaled, with the scale in
``optimizer.grad_scale``, and lets them skip by ``optimizer.found_inf``; both are device tensors and are used as such,
so nothing waits for the device.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_UNSTABLE = 2.0  # gradient descent on a quadratic of curvature h diverges for lr * h > 2


class _History(Protocol):
    def stiffness(self, lam: float | Tensor, lr: float | Tensor) -> float | Tensor: ...
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor: ...
    def decoupled_step_(self, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> None: ...


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that moves parameters. accelerate wraps it in another, which steps it once gradients are complete
    and has no hooks of its own."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class Attachment:
    """What ``history.attach`` does to an optimizer, until ``remove``."""

    def __init__(self, history: _History, optimizer: Optimizer, lam: float | Tensor, decoupled: bool) -> None:
        self._history, self._lam = history, lam
        self._warned = False
        register = optimizer.register_step_post_hook if decoupled else optimizer.register_step_pre_hook
        self._handle: RemovableHandle = register(self._after_step if decoupled else self._before_step)

    def remove(self) -> None:
        self._handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the penalty's gradient, at the scale of the gradients that are there."""
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise RuntimeError(
                "optimizer.step was given a closure, which computes gradients after this hook has added the penalty's. "
                "Add rank1_ewc_penalty or diagonal_ewc_penalty to the loss inside the closure instead, or attach with "
                "decoupled=True."
            )
        self._warn_if_stiff(optimizer)
        scale = getattr(optimizer, "grad_scale", None)
        self._history.add_penalty_grad_(self._lam if scale is None else scale.double() * self._lam)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The proximal step, unless the optimizer has skipped its own."""
        found_inf = getattr(optimizer, "found_inf", None)
        lam = self._lam
        if found_inf is not None:
            strength = lam if isinstance(lam, Tensor) else torch.full_like(found_inf, lam, dtype=torch.float64)
            lam = torch.where(found_inf > 0, 0.0, strength)
        self._history.decoupled_step_(lam, optimizer.param_groups)

    def _warn_if_stiff(self, optimizer: Optimizer) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        if self._warned or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (self._lam, *rates)):
            return  # looking at a device's number would wait for it
        stiffness = float(self._history.stiffness(self._lam, max(float(rate) for rate in rates)))
        if stiffness > _UNSTABLE:
            self._warned = True
            warnings.warn(
                f"the penalty is stiff: lr * lam * curvature = {stiffness:.3g}. As a gradient it diverges above "
                f"{_UNSTABLE:.0f} under plain SGD, and what Adam makes of it can drown the task's own. Use a smaller "
                "lam, or attach with decoupled=True, which is stable at every lam.",
                stacklevel=2,
            )
