"""Does a sample's loss depend on that sample alone? The check exchanges the other samples and compares the losses."""

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..model.preserved import same_random_numbers
from .batches import batch_size, reorder_batch

_FEW = 8
# Losses and models that were checked and do not mix samples. A bound method is a new object in every call, so only
# functions can be remembered.
_INDEPENDENT: WeakKeyDictionary[Callable[..., Any], WeakSet[nn.Module]] = WeakKeyDictionary()
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
    """Raises ValueError if a sample's loss changes when other samples of the batch change. Checks each loss and model
    once.

    Some samples are kept and replace the others, in batches of the same size. In batches of up to 8 samples, for every
    binary digit of a sample's number, first the samples with a 0 are kept, then those with a 1. In larger batches, a
    random half is kept, then the other half, for two such halves. Each call uses the same random numbers, so every
    sample gets the same noise again; the global generators are restored. No error is raised where the check is not
    possible: one sample, a batch that cannot be reordered, a loss that draws other random numbers for other samples, or
    a loss that differs between two calls on the same batch because its random numbers come from elsewhere.

    Args:
        argument: the name of the loss in the caller's signature.
        loss: the caller's argument; ``losses_of`` calls it.
    """

    def losses_and_state(batch: Any) -> tuple[Tensor, Tensor]:
        """The losses, and the random state after them."""
        with same_random_numbers(device):
            return losses_of(batch).detach().cpu(), torch.get_rng_state()

    count = batch_size(batch)
    models = _INDEPENDENT.setdefault(loss, WeakSet()) if isinstance(loss, FunctionType) else WeakSet()
    if count < 2 or model in models:
        return
    original, state = losses_and_state(batch)
    changed = torch.zeros(count, dtype=torch.bool)
    for kept in _halves(count):
        place, kept_places = torch.arange(count), kept.nonzero().flatten()
        try:
            other = reorder_batch(batch, place.where(kept, kept_places[place % len(kept_places)]))
        except (TypeError, ValueError):
            return
        exchanged, other_state = losses_and_state(other)
        if not torch.equal(state, other_state):
            return
        changed |= kept & differ(original, exchanged)
    if not bool(changed.any()) or bool(differ(original, losses_and_state(batch)[0]).any()):
        models.add(model)
        return
    raise ValueError(
        f"{argument} mixes samples: the loss of sample {int(changed.nonzero()[0])} of {count} changes when "
        "other samples of the batch are exchanged. Such a loss has no per-sample gradients (contrastive terms, a mean "
        "over the batch's tokens, batch statistics, such as those of a BatchNorm that was built with "
        "track_running_stats=False). Compute each loss from its own sample alone; or give mixed_losses=True, if you "
        "want the gradient of loss i by everything that it depends on."
    )


def _halves(count: int) -> list[Tensor]:
    """Masks of the samples that are kept, one for each batch."""
    place = torch.arange(count)
    if count <= _FEW:
        masks = [place >> digit & 1 == 1 for digit in range((count - 1).bit_length())]
    else:
        generator = torch.Generator().manual_seed(0)
        masks = [torch.randperm(count, generator=generator) < count // 2 for _ in range(2)]
    return [kept for mask in masks for kept in (mask, ~mask)]


def differ(losses: Tensor, others: Tensor) -> Tensor:
    """(N,) booleans: where finite ``losses`` differ from ``others`` by more than rounding."""
    rounding = _ROUNDING.get(losses.dtype, _ROUNDING_16_BIT)
    scale = losses.abs().clamp(min=float(losses.abs().mean()))
    return ~((losses - others).abs() <= rounding * scale) & torch.isfinite(losses)
