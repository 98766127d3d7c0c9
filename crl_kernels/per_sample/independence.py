"""Does a sample's loss depend on that sample alone? Losses are computed again with the other samples exchanged."""

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..model.preserved import same_random_numbers
from .batches import batch_size, reorder_batch

_FEW = 8
_KNOWN: WeakKeyDictionary[Callable[..., Any], WeakSet[nn.Module]] = WeakKeyDictionary()  # not to mix samples
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_16_BIT = 0.05


def require_independent_losses(
    argument: str,
    loss: Callable[..., Any],
    losses_of: Callable[[Any], Tensor],
    batch: Any,
    model: nn.Module,
    device: torch.device,
) -> None:
    """Raises ValueError if a loss changes when other samples of the batch do; once for each loss and model.

    Some samples are kept and the others replaced by them, in batches of the same size: for every binary digit of a
    sample's number, those with a 0 are kept and then those with a 1; in larger batches, two halves at random, twice.
    Each call meets the same random numbers, so that a sample has its own noise again, and the global generators are
    left as they were. Says nothing where that cannot be told: for one sample, a batch that cannot be reordered, a loss
    that draws other numbers for other samples, or one that gives other losses for the same batch, because its random
    numbers come from elsewhere.

    Args:
        argument: the name of the loss in the caller's signature.
        loss: what the caller was given; ``losses_of`` calls it.
    """

    def losses(of: Any) -> tuple[Tensor, Tensor]:
        """And the random state that they leave behind."""
        with same_random_numbers(device):
            return losses_of(of).detach().cpu(), torch.get_rng_state()

    count = batch_size(batch)
    models = _KNOWN.setdefault(loss, WeakSet()) if _lives_on(loss) else WeakSet()
    if count < 2 or model in models:
        return
    as_given, state = losses(batch)
    changed = torch.zeros(count, dtype=torch.bool)
    for kept in _halves(count):
        place, those = torch.arange(count), kept.nonzero().flatten()
        try:
            other = reorder_batch(batch, place.where(kept, those[place % len(those)]))
        except (TypeError, ValueError):
            return
        exchanged, other_state = losses(other)
        if not torch.equal(state, other_state):
            return
        changed |= kept & _differ(as_given, exchanged)
    if not bool(changed.any()) or bool(_differ(as_given, losses(batch)[0]).any()):
        models.add(model)
        return
    raise ValueError(
        f"{argument} mixes samples: the loss of sample {int(changed.nonzero()[0])} of {count} changes when "
        "other samples of the batch are exchanged, and there are no per-sample gradients of such a loss (contrastive "
        "terms, a mean over the batch's tokens, batch statistics, such as those of a BatchNorm that was built with "
        "track_running_stats=False). Compute each loss from its own sample alone; or give mixed_losses=True, if the "
        "gradient of loss i by everything that it depends on is what you mean."
    )


def _halves(count: int) -> list[Tensor]:
    """Which samples are kept in each batch."""
    place = torch.arange(count)
    if count <= _FEW:
        ones = [place >> digit & 1 == 1 for digit in range((count - 1).bit_length())]
    else:
        generator = torch.Generator().manual_seed(0)
        ones = [torch.randperm(count, generator=generator) < count // 2 for _ in range(2)]
    return [kept for one in ones for kept in (one, ~one)]


def _lives_on(loss: Callable[..., Any]) -> bool:
    """A function does; a bound method is another object in every call."""
    return isinstance(loss, FunctionType)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    rounding = _ROUNDING.get(one.dtype, _ROUNDING_16_BIT)
    scale = one.abs().clamp(min=float(one.abs().mean()))
    return ~((one - other).abs() <= rounding * scale) & torch.isfinite(one)
