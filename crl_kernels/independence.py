"""Does a sample's loss depend on that sample alone? Losses are computed again with the other samples exchanged."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import reorder_batch
from .preserved import RandomState, same_random_numbers

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_16_BIT = 0.05


def require_independent_losses(
    argument: str, losses_of: Callable[[Any], Tensor], batch: Any, losses: Tensor, before: RandomState
) -> None:
    """Raises ValueError if a loss changes when other samples of the batch do.

    The first half is put in place of the second one, and the other way round; ``losses_of`` is called without
    gradients and with the random numbers that ``losses`` had, so that a sample meets its own noise again. Says nothing
    where that cannot be told: for one sample, a batch that cannot be reordered, or a loss whose random numbers come
    from elsewhere, so that it gives other losses for the same batch.

    Args:
        argument: the name of the loss in the caller's signature.
        losses: (N,), those of ``batch``.
        before: the random state before ``losses`` were computed.
    """
    count = len(losses)
    if count < 2:
        return
    place = torch.arange(count)
    half = count // 2
    first, second = place % half, half + place % (count - half)
    try:
        exchanged = [(reorder_batch(batch, order), order == place) for order in (first, second)]
    except (TypeError, ValueError):
        return

    def again(other: Any) -> Tensor:
        with torch.no_grad(), same_random_numbers(losses.device):
            before.restore()
            return losses_of(other).detach()

    differ = [(kept.to(losses.device) & _differ(losses.detach(), again(other))) for other, kept in exchanged]
    worst = (differ[0] | differ[1]).nonzero().flatten()
    if not len(worst) or bool(_differ(losses.detach(), again(batch)).any()):
        return
    raise ValueError(
        f"{argument} mixes samples: the loss of sample {int(worst[0])} of a batch of {count} changes when other "
        "samples of the batch are exchanged, and there are no per-sample gradients of such a loss (batch statistics, "
        "contrastive terms, a mean over the batch's tokens). Compute each loss from its own sample alone; or give "
        "mixed_losses=True, if the gradient of loss i by everything that it depends on is what you mean."
    )


def _differ(one: Tensor, other: Tensor) -> Tensor:
    rounding = _ROUNDING.get(one.dtype, _ROUNDING_16_BIT)
    scale = one.abs().clamp(min=float(one.abs().mean()))
    return ~((one - other).abs() <= rounding * scale) & torch.isfinite(one)
