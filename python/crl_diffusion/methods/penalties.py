"""Penalties: from the `Penalty` of a method to a `crl_kernels` history of all tasks learnt. No mathematics here."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.config.method import Penalty
from crl_diffusion.diffusion.noising import TIMESTEPS
from crl_diffusion.methods.controls import SlopesAlone, along_random_directions
from crl_diffusion.methods.optimizers import adam_denominator
from crl_kernels import (
    DiagonalFisher,
    DiagonalHistory,
    FisherWarning,
    LowRankFisher,
    LowRankHistory,
    estimate_fisher,
)

# What to do about a warning of `estimate_fisher`, by its kind, in the words of the command line.
ADVICE = {
    "rho": "`crl-diffusion diagnose` compares forms that may hold more: rank1:top, rank<k> or bands<n> in --method.",
    "signal_share": "Give more --fisher-samples, or rank1:top or bands<n>:top in --method.",
    "strata": "Give more --fisher-samples, or fewer bands in --method.",
}
PerSampleLoss = Callable[[nn.Module, Any], Tensor]
STATISTICS = ("num_samples", "kappa", "rho", "trace", "signal_share", "samples_needed")
SLOPES_ALONE = "slopes_alone"  # key in a checkpoint, next to the keys of the history


class PenaltyState:
    """The history of past tasks, and where the penalty acts in a training step: after backward or after the step."""

    def __init__(self, spec: Penalty, model: nn.Module, in_sample: bool = False) -> None:
        self.spec, self.model, self.in_sample = spec, model, in_sample
        self.history: LowRankHistory | DiagonalHistory = self._new_history()
        self.slopes_alone = SlopesAlone(model, spec.lam) if spec.mode == "alone" else None
        self.kept_gradient: list[tuple[nn.Parameter, Tensor]] = []  # of the penalty, in mode damping
        self.seconds: list[float] = []  # durations of the penalty's calls since the last row of timings

    @property
    def strength(self) -> float:
        """What the history's penalty is multiplied by: lam. For l2_average, whose history has curvature 1 for each of
        its k tasks, so k around the mean of their weights, lam / k."""
        return self.spec.lam / self._tasks_that_share

    @property
    def _tasks_that_share(self) -> int:
        """The number of tasks that share lam; 1 if each has all of it."""
        return max(1, len(self.history)) if self.spec.fisher == "l2_average" else 1

    def after_backward(self) -> None:
        """Mode gradient: add the gradient of the penalty to that of the loss. Mode damping: keep it for the step."""
        if not len(self.history):
            return
        if self.spec.mode == "gradient":
            self._timed(lambda: self.history.add_penalty_grad_(self.strength))
        elif self.spec.mode == "damping":
            self._timed(self._note_gradient)

    def after_step(self, lr: float, optimizer: torch.optim.Optimizer) -> None:
        """Mode decoupled: the proximal step of the penalty. Mode preconditioned: a step along its gradient, divided by
        Adam's denominator. Mode damping: repeat Adam's step with the square of the kept gradient in v. Mode alone:
        the step of the first-order term. All use the learning rate of this optimizer step."""
        if not len(self.history):
            return
        if self.spec.mode == "decoupled":
            self._timed(lambda: self.history.decoupled_step_(self.strength, lr))
        elif self.spec.mode == "preconditioned":
            self._timed(partial(self._preconditioned_step, lr, optimizer))
        elif self.spec.mode == "damping":
            self._timed(partial(self._damped_step, lr, optimizer))
        elif self.slopes_alone is not None:
            self._timed(partial(self.slopes_alone.step_, lr))

    def learn(
        self,
        per_sample_loss: PerSampleLoss,
        batches: Sequence[tuple[Tensor, ...]],
        generator: torch.Generator,
        task_lr: float,
    ) -> dict[str, Any]:
        """Estimate the Fisher matrix of the task that has just been learnt and append it to the history. Returns its
        statistics; those that this kind of matrix lacks are None. `task_lr` is the sum of the task's learning rates. An
        L2 penalty needs no batches: it appends the identity, and l2 keeps the last task only."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fisher = self._estimate(per_sample_loss, batches, generator)
        for warning in (record.message for record in caught):
            known = isinstance(warning, FisherWarning)
            warnings.warn(f"{warning.finding} {ADVICE[warning.kind]}" if known else warning, stacklevel=2)
        if self.spec.direction in ("random", "signs"):
            fisher = along_random_directions(fisher, self.model, generator, self.spec.direction == "signs")
        if self.spec.mode == "once":
            # Control: one proximal step at the end of the task, with its total learning rate; no penalty afterwards.
            once = self._new_history()
            once.append(fisher)
            once.decoupled_step_(self.spec.lam, task_lr)
        if self.spec.fisher == "l2":
            self.history = self._new_history()
        self.history.append(fisher)
        if self.slopes_alone is not None:
            self.slopes_alone.learn(self.history, fisher, task_lr)
        values = {name: getattr(fisher.statistics, name, math.nan) for name in STATISTICS}
        statistics: dict[str, Any] = {name: x if math.isfinite(x) else None for name, x in values.items()}
        if isinstance(fisher, LowRankFisher):
            statistics["curvatures"] = fisher.curvatures.tolist()
            statistics["slopes"] = None if fisher.slopes is None else fisher.slopes.tolist()
        return statistics

    def suggested_lam(self, lr: float, steps: int) -> float | None:
        """The lam at which drift halves within the steps of the next task, at the mean learning rate `lr`, see
        `LowRankHistory.suggest_lam`; None if the Fisher matrices are zero."""
        try:
            return self._tasks_that_share * self.history.suggest_lam(lr, steps)
        except ValueError:
            return None

    def directions(self) -> list[dict[str, Tensor]]:
        """The unit directions of all past tasks, each as tensors by parameter; none for a diagonal."""
        return list(self.history.directions()) if isinstance(self.history, LowRankHistory) else []

    @property
    def nbytes(self) -> int:
        return int(self.history.nbytes)

    def state(self) -> dict[str, Tensor]:
        """The state of the history and of the control `alone`; empty before the end of the first task."""
        if not len(self.history):
            return {}
        control = {} if self.slopes_alone is None else {SLOPES_ALONE: self.slopes_alone.slopes}
        return self.history.state_dict() | control

    def load_state(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        self.history.load_state_dict({name: value for name, value in state.items() if name != SLOPES_ALONE})
        if self.slopes_alone is not None:
            self.slopes_alone.set(self.history, state[SLOPES_ALONE])

    def _new_history(self) -> LowRankHistory | DiagonalHistory:
        if self.spec.fisher == "low_rank":
            return LowRankHistory(self.model, first_order=self.spec.slopes)
        return DiagonalHistory(self.model)

    def _estimate(
        self, per_sample_loss: PerSampleLoss, batches: Sequence[tuple[Tensor, ...]], generator: torch.Generator
    ) -> LowRankFisher | DiagonalFisher:
        spec = self.spec
        if not spec.is_estimated:
            anchor = dict(self.model.named_parameters())
            return DiagonalFisher({name: torch.ones_like(p) for name, p in anchor.items()}, anchor)
        if spec.fisher == "diagonal":
            return estimate_fisher(
                self.model,
                per_sample_loss,
                batches,
                kind="diagonal",
                generator=generator,
                process_group=processes.group(),
            )

        def banded(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            """Each sample's band of timesteps beside its loss; batch is (noised, t, label, noise)."""
            return per_sample_loss(model, batch), batch[1] * spec.bands // TIMESTEPS

        return estimate_fisher(
            self.model,
            banded if spec.bands > 1 else per_sample_loss,
            batches,
            kind="low_rank",
            rank=spec.rank,
            direction="top" if spec.direction == "top" or spec.rank > 1 else "mean",
            unbiased=not self.in_sample,
            generator=generator,
            process_group=processes.group(),
        )

    @torch.no_grad()
    def _preconditioned_step(self, lr: float, optimizer: torch.optim.Optimizer) -> None:
        """theta <- theta - lr * gradient of the penalty / (sqrt(v) + eps), with Adam's v, which never sees it."""
        optimizer.zero_grad()
        self.history.add_penalty_grad_(self.spec.lam)
        for p in self.model.parameters():
            if p.grad is not None:
                p.addcdiv_(p.grad, adam_denominator(optimizer, p), value=-lr)

    @torch.no_grad()
    def _note_gradient(self) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        of_loss = [p.grad.clone() for p in parameters if p.grad is not None]
        self.history.add_penalty_grad_(self.spec.lam)
        self.kept_gradient = []
        for p, gradient in zip(parameters, of_loss, strict=True):
            assert p.grad is not None
            self.kept_gradient.append((p, p.grad - gradient))
            p.grad.copy_(gradient)

    @torch.no_grad()
    def _damped_step(self, lr: float, optimizer: torch.optim.Optimizer) -> None:
        """Adam has added (1 - beta2) g^2 to v, and moved by -lr m / (sqrt(v) + eps): make that (1 - beta2) (g^2 + p^2),
        with p the gradient of the penalty, and the same m. With (g + p)^2, v would vanish where p = -g."""
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        for p, gradient in self.kept_gradient:
            state = optimizer.state[p]
            step = lr * state["exp_avg"] / (1 - beta1 ** float(state["step"]))
            p.addcdiv_(step, adam_denominator(optimizer, p))
            state["exp_avg_sq"].addcmul_(gradient, gradient, value=1 - beta2)
            p.addcdiv_(step, adam_denominator(optimizer, p), value=-1)

    def _timed(self, call: Callable[[], Any]) -> None:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        self.seconds.append(time.perf_counter() - start)

    def _wait(self) -> None:
        """Wait for the GPU: its work is asynchronous, so it must be finished before the clock is read."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
