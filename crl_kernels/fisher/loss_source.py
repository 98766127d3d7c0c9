"""Checked per-sample losses of a task's batches, and their gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.shards import Shards
from ..model.arguments import shown
from ..model.binding import Binding
from ..per_sample.batches import batch_size
from ..per_sample.independence import require_independent_losses
from ..per_sample.sample_gradients import SampleGradients

PerSampleLoss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class LossSource:
    """The per-sample losses of one model, checked, and their per-sample gradients or the sum of these."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss, binding: Binding, mixed_losses: bool) -> None:
        require_per_sample_loss("per_sample_loss", per_sample_loss)
        self.model, self.binding, self._loss = model, binding, per_sample_loss
        self.stratified: bool | None = None
        self._independence_settled = mixed_losses  # may be mixed, or were found to be independent

    def check_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches. On the first batch of several samples, checks that losses do not mix samples."""
        for batch in batches:
            if not self._independence_settled:
                require_independent_losses(
                    "per_sample_loss",
                    self._loss,
                    lambda other: self.losses(other)[0],
                    batch,
                    self.model,
                    self.binding.device,
                )
                self._independence_settled = batch_size(batch) > 1
            yield batch

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(losses, stratum of each sample), each (N,); all strata are 0 if the loss returns none."""
        count = batch_size(batch)
        losses: Any = self._loss(self.model, batch)
        if any(parameter.grad is not None for parameter in self.binding.params):
            raise ValueError(
                "per_sample_loss calls backward(); return the losses, whose gradients are taken from here."
            )
        stratum = None
        if stratified := isinstance(losses, tuple) and len(losses) == 2:
            losses, stratum = losses
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            kind = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"per_sample_loss returned {kind} for a batch of {count}; expected ({count},), one loss per sample, "
                "such as (error ** 2).mean(dim=(1, 2, 3))."
            )
        if not losses.is_floating_point():
            raise TypeError(f"per_sample_loss returned {losses.dtype}; expected real floating-point losses.")
        if not losses.requires_grad:
            raise ValueError("per_sample_loss carries no gradient: compute it from model, outside of torch.no_grad().")
        if self.stratified not in (None, stratified):
            raise ValueError("per_sample_loss returned strata for some batches and none for others.")
        self.stratified = stratified
        if not stratified:
            return losses, torch.zeros(count, dtype=torch.int64, device=losses.device)
        if not isinstance(stratum, Tensor) or stratum.shape != (count,):
            kind = f"shape {tuple(stratum.shape)}" if isinstance(stratum, Tensor) else f"a {type(stratum).__name__}"
            raise ValueError(
                f"per_sample_loss returned strata of {kind} for a batch of {count}; expected a tensor ({count},)."
            )
        if stratum.is_floating_point() or stratum.is_complex() or stratum.dtype == torch.bool:
            raise TypeError(f"per_sample_loss returned strata of {stratum.dtype}; expected integers.")
        return losses, stratum.detach().to(losses.device, torch.int64)

    def sample_gradients(self, **options: Any) -> SampleGradients:
        return SampleGradients(self.model, include=self.binding.include, exclude=self.binding.exclude, **options)

    def clear_gradients(self) -> None:
        """Frees ``.grad``, which nobody reads; the caller's gradients were set aside before."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def gradient_sum(self, losses: Tensor) -> Tensor:
        """sum_i g_i, (P,), by an ordinary backward pass."""
        params = self.binding.params
        gradients = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1).to(self.binding.dtype)
                for g, p in zip(gradients, params, strict=True)
            ]
        )


def require_per_sample_loss(argument: str, loss: Any, arguments: str = "model, batch") -> None:
    """TypeError for what cannot be called with a model and a batch, such as a criterion of torch."""
    if isinstance(loss, torch.nn.modules.loss._Loss) or not callable(loss):
        raise TypeError(
            f"{argument} is {shown(loss)}; expected a function ({arguments}) -> (N,), one loss for each sample, "
            f"such as lambda {arguments}: F.cross_entropy(model(batch[0]), batch[1], reduction='none')."
        )


def require_finite_gradients(values: Tensor, shards: Shards | None = None) -> Tensor:
    """Returns ``values``. Processes that have shards of them raise together."""
    extremes = torch.stack(values.aminmax()) if values.numel() else values  # without temporaries, unlike isfinite
    not_finite = extremes.isfinite().all().logical_not().double()
    if bool(not_finite if shards is None else shards.max_(not_finite)):
        raise ValueError("per_sample_loss has NaN or infinite gradients, and a Fisher of them would mean nothing.")
    return values


def current_parameters(binding: Binding) -> dict[str, Tensor]:
    return dict(zip(binding.layout.names, binding.params, strict=True))
