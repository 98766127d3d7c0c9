"""Projections of per-sample gradients on a known direction, in forward mode, without a backward pass.

p_i = u . g_i = d/de loss_i(theta + e u) at e = 0
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.binding import Binding
from ..model.preserved import same_random_numbers
from .batches import batch_size
from .directions import rows_of


class _Holder(nn.Module):
    """``functional_call`` needs a module: this one calls the loss, on the model with replaced parameters."""

    def __init__(self, model: nn.Module, per_sample_loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        super().__init__()
        self.model, self._loss, self._batch = model, per_sample_loss, batch

    def forward(self) -> Tensor:
        return self._loss(self.model, self._batch)


def jvp_projections(
    model: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    direction: Mapping[str, Tensor],
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> Tensor:
    r"""p_i = u . g_i for each sample of a batch, by forward-mode automatic differentiation.

    For each direction, one forward pass that carries a tangent. If you only need projections on a given direction, this
    is cheaper than ``SampleGradients(model, direction)`` and needs no memory for a backward pass. All directions see
    the same random numbers. Attention runs on PyTorch's plain ("math") kernel during the call, because the fast
    kernels have no forward mode.

    Args:
        model: left as it is; call ``model.eval()`` yourself if you need it.
        per_sample_loss: ``(model, batch) -> (N,)``, one loss for each sample, from that sample alone.
        batch: N samples, as ``per_sample_loss`` takes them; see :func:`estimate_fisher`.
        direction: parameter name -> tensor u of the parameter's shape; or (K, \*shape), for K directions. A parameter
            that is left out counts as zero.
        include, exclude: patterns that choose parameters, as in :class:`LowRankHistory`.

    Returns:
        (N,) float64, or (N, K) for K directions.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
        NotImplementedError: PyTorch raises it for a function without forward mode, by name.
    """
    binding = Binding(model, include, exclude)
    binding.require_whole()
    single, rows = rows_of(direction, binding)
    holder = _Holder(model, per_sample_loss, batch)
    name_of = {id(parameter): name for name, parameter in holder.named_parameters()}
    names = [name_of[id(parameter)] for parameter in binding.params]
    count = batch_size(batch)

    def losses(values: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = torch.func.functional_call(holder, dict(zip(names, values, strict=True)), ())
        if not isinstance(result, Tensor) or result.shape != (count,):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise ValueError(f"per_sample_loss returned {got} for a batch of {count}; expected ({count},).")
        return result

    theta = tuple(parameter.detach() for parameter in binding.params)
    projections = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for k in range(len(rows[0])):
            u = tuple(row[k].reshape(p.shape).to(p.dtype) for row, p in zip(rows, theta, strict=True))
            if k + 1 < len(rows[0]):
                with same_random_numbers(binding.device):
                    projections.append(torch.func.jvp(losses, (theta,), (u,))[1])
            else:
                projections.append(torch.func.jvp(losses, (theta,), (u,))[1])
    result = torch.stack(projections, 1).double()
    return result[:, 0] if single else result
