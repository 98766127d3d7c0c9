"""A model's parameters in one buffer and their gradients in another, so that kernels get one tensor and not a list.

This is optional: lists of tensors work everywhere and give the same numbers, bit for bit. One buffer saves the overhead
of a list, which is visible in small models with many tensors.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Puts the parameters that require a gradient into one buffer, and their gradients into another, as views.

    The model keeps its Parameter objects, so optimizers, ``state_dict`` and ``load_state_dict`` work as before. Values
    are unchanged, and parameters without a gradient get one of zeros. Memory formats other than row-major (such as
    channels_last) are not kept.

    Some calls give a parameter or a gradient its own memory again: ``zero_grad()``, unless ``set_to_none=False``;
    ``model.half()`` or ``model.to(device)``. Histories check this at every call, and then use the list of tensors.

    Args:
        model: its parameters that require a gradient, of one dtype and on one device.

    Returns:
        (parameters, gradients): two flat (P,) tensors, in the order of ``model.parameters()``.

    Raises:
        TypeError, ValueError: not a module, nothing to flatten, or parameters of several dtypes or devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not params:
        raise ValueError("model has no parameter that requires a gradient.")
    kinds = {(parameter.dtype, parameter.device) for parameter in params}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"model has parameters of {listed}; one buffer holds one dtype on one device.")
    if sparse := [name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse]:
        raise ValueError(f"the gradient of {sparse[0]!r} is sparse and cannot be a view of a buffer.")
    theta = torch.cat([parameter.reshape(-1) for parameter in params])
    gradient = torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in params])
    lengths = [parameter.numel() for parameter in params]
    for parameter, values, grads in zip(params, theta.split(lengths), gradient.split(lengths), strict=True):
        parameter.data = values.view(parameter.shape)
        parameter.grad = grads.view(parameter.shape)
    return theta, gradient


class FlatRun:
    """Finds out whether a list of tensors lies in one buffer, one after the other, and returns that run as one tensor.

    The last result is kept while the tensors' addresses stay the same. It keeps their memory alive, so that no other
    tensor can get these addresses.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._offsets = [0, *accumulate(lengths)]
        filled = [i for i, length in enumerate(lengths) if length]
        self._pair = (
            ((filled[0], filled[-1]), self._offsets[filled[-1]] - self._offsets[filled[0]]) if len(filled) > 1 else None
        )
        self._pointers: list[int] = []
        self._run: Tensor | None = None

    def find(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """The flat tensor over the memory of ``tensors``; None if they do not lie in one row-major run."""
        if not self._may_run(tensors):  # a quick check of two of them
            self._pointers, self._run = [], None
            return None
        pointers = list(map(Tensor.data_ptr, tensors))
        if pointers != self._pointers:
            self._pointers, self._run = pointers, self._find_run(tensors, pointers)
        if self._run is not None and not all(map(Tensor.is_contiguous, tensors)):
            return None
        return self._run

    def _may_run(self, tensors: Sequence[Tensor]) -> bool:
        if self._pair is None:
            return False
        (i, j), distance = self._pair
        return tensors[j].data_ptr() - tensors[i].data_ptr() == distance * tensors[i].element_size()

    def _find_run(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Tensor | None:
        filled = [(t, p, o) for t, p, o in zip(tensors, pointers, self._offsets, strict=False) if t.numel()]
        first, begin, _ = filled[0]
        if any(pointer != begin + first.element_size() * offset for _, pointer, offset in filled):
            return None
        storage = first.untyped_storage().data_ptr()
        if any(t.dtype != first.dtype or t.untyped_storage().data_ptr() != storage for t, _, _ in filled):
            return None
        return first.detach().as_strided((self._offsets[-1],), (1,))
