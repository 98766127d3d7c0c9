"""Does a sample's loss depend on that sample alone? Losses are computed again with the other samples exchanged."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import batch_size, reorder_batch, slice_batch
from .preserved import same_random_numbers

_SAMPLES = 8
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_16_BIT = 0.05


def require_independent_losses(
    argument: str, losses_of: Callable[[Any], Tensor], batch: Any, device: torch.device
) -> None:
    """Raises ValueError if a loss changes when other samples of the batch do.

    Looks at the batch's first eight samples: the first half is put in place of the second one, and the other way round.
    Each call meets the same random numbers, so that a sample has its own noise again, and the global generators are
    left as they were. Says nothing where that cannot be told: for one sample, a batch that cannot be cut or reordered,
    or a loss that gives other losses for the same batch, because its random numbers come from elsewhere.

    Args:
        argument: the name of the loss in the caller's signature.
    """

    def losses(of: Any) -> Tensor:
        with same_random_numbers(device):
            return losses_of(of).detach()

    count = min(batch_size(batch), _SAMPLES)
    if count < 2:
        return
    place = torch.arange(count)
    half = count // 2
    orders = place % half, half + place % (count - half)
    try:
        few = slice_batch(batch, 0, count)
        exchanged = [reorder_batch(few, order) for order in orders]
    except (TypeError, ValueError):
        return
    as_given = losses(few)
    changed = torch.zeros(count, dtype=torch.bool)
    for order, other in zip(orders, exchanged, strict=True):
        changed |= (order == place) & _differ(as_given, losses(other)).cpu()
    if not bool(changed.any()) or bool(_differ(as_given, losses(few)).any()):
        return
    raise ValueError(
        f"{argument} mixes samples: the loss of sample {int(changed.nonzero()[0])} of {count} changes when "
        "other samples of the batch are exchanged, and there are no per-sample gradients of such a loss (contrastive "
        "terms, a mean over the batch's tokens, batch statistics, such as those of a BatchNorm that was built with "
        "track_running_stats=False). Compute each loss from its own sample alone; or give mixed_losses=True, if the "
        "gradient of loss i by everything that it depends on is what you mean."
    )


def _differ(one: Tensor, other: Tensor) -> Tensor:
    rounding = _ROUNDING.get(one.dtype, _ROUNDING_16_BIT)
    scale = one.abs().clamp(min=float(one.abs().mean()))
    return ~((one - other).abs() <= rounding * scale) & torch.isfinite(one)
