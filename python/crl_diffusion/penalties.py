"""Penalties: from a method's `Penalty` value to a `crl_kernels` history of all tasks learnt. No mathematics here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crl_diffusion.method import Penalty
from crl_kernels import DiagonalHistory, LowRankHistory, estimate_fisher

FISHERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "rank1": (LowRankHistory, {"kind": "low_rank", "rank": 1}),
    "diagonal": (DiagonalHistory, {"kind": "diagonal"}),
}
STATISTICS = ("num_samples", "kappa", "rho", "trace")


class PenaltyState:
    """What a run keeps of its past tasks, and the two moments of a step at which a penalty may act."""

    def __init__(self, spec: Penalty, model: nn.Module) -> None:
        self.spec, self.model = spec, model
        history_type, self.estimate = FISHERS[spec.fisher]
        self.history = history_type(model)
        self.seconds: list[float] = []  # time of each call since it was last read

    def after_backward(self) -> None:
        """Gradient mode: add the penalty's gradient to the loss's."""
        if self.spec.mode == "gradient" and len(self.history):
            self._timed(lambda: self.history.add_penalty_grad_(self.spec.lam))

    def after_step(self, lr: float) -> None:
        """Decoupled mode: the penalty's own proximal step, with the optimizer's learning rate of this step."""
        if self.spec.mode == "decoupled" and len(self.history):
            self._timed(lambda: self.history.decoupled_step_(self.spec.lam, lr))

    def learn(
        self, per_sample_loss: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any], generator: torch.Generator
    ) -> dict[str, float | None]:
        """Append the Fisher matrix of the task that has just been learnt; returns its statistics, None for those that
        this kind of matrix does not have."""
        fisher = estimate_fisher(self.model, per_sample_loss, batches, generator=generator, **self.estimate)
        self.history.append(fisher)
        found = {name: getattr(fisher.statistics, name, math.nan) for name in STATISTICS}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    @property
    def nbytes(self) -> int:
        return int(self.history.nbytes)

    def state(self) -> dict[str, Tensor]:
        """The history's state; nothing before the first task."""
        return self.history.state_dict() if len(self.history) else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self.history.load_state_dict(state)

    def _timed(self, call: Callable[[], Any]) -> None:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        self.seconds.append(time.perf_counter() - start)

    def _wait(self) -> None:
        """A GPU works behind the clock's back: wait for it on both sides of what is timed."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
