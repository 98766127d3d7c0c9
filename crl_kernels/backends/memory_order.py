"""The order in which memory holds a tensor's elements: row-major, channels_last, or any other.

Operators work element by element along a tensor, or sum over it. So a parameter and everything that goes with it
(gradient, moments, directions) may be read in any order that they share. A tensor is dense if its elements fill one
stretch of memory, each place once; a dense parameter is read in the order of its memory, any other in row-major order.
So is a parameter that has a direction in int8, whose blocks are of that order. ``csrc/operands.h`` has the same rules.

A vector along parameters is one tensor for each of them, or one for all: (P,), each parameter's elements in row-major
order, or a row, (1, P), in the order of its memory. A row is quick to pass and means something else for parameters in
another order, so it is for callers that know the order of the tensors that an operator runs along.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a dense tensor that is not row-major; None for the row-major order."""
    if tensor.is_contiguous() or not _is_dense(tensor.shape, tensor.stride()):
        return None
    return tensor.stride()


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, copied if its elements are not in the order in which ``like`` is read."""
    order = order_of(like)
    if order is None:
        return tensor.contiguous()
    strides = zip(tensor.stride(), order, like.shape, strict=False)
    if tensor.shape == like.shape and all(stride == other or size == 1 for stride, other, size in strides):
        return tensor
    copy = torch.empty_strided(like.shape, order, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.reshape(like.shape))


def is_row(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == 1


class FlatOrder:
    """The order of a flat vector's elements: parameter after parameter, each in the order of its own memory."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._shapes = [parameter.shape for parameter in params]
        self._lengths = [parameter.numel() for parameter in params]
        self._strides = [parameter.stride() for parameter in params]
        # Each parameter's dimensions from the slowest to the fastest; None if all are row-major.
        self._dims: list[list[int]] | None = None
        orders = [order_of(parameter) for parameter in params]
        if any(orders):
            strides = [order or range(p.dim(), 0, -1) for order, p in zip(orders, params, strict=True)]
            self._dims = [sorted(range(len(s)), key=s.__getitem__, reverse=True) for s in strides]

    @property
    def is_row_major(self) -> bool:
        return self._dims is None

    def same_as(self, other: "FlatOrder") -> bool:
        return self._dims == other._dims

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Whether parameters have the strides that this order was made for. Quick, for every step."""
        row_major = self._dims is None and all(map(Tensor.is_contiguous, params))  # the common case, at half the cost
        return row_major or list(map(Tensor.stride, params)) == self._strides

    def flatten(self, tensors: Iterable[Tensor], leading: Sequence[int] = ()) -> Tensor:
        """The flat (*leading, P) tensor of tensors (*leading, *shape)."""
        flat, count = [], len(leading)
        for i, tensor in enumerate(tensors):
            if self._dims is not None:
                tensor = tensor.permute([*range(count), *(count + dim for dim in self._dims[i])])
            flat.append(tensor.reshape(*leading, tensor.shape[count:].numel()))
        return torch.cat(flat, dim=-1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat (P,) tensor as views with the parameters' shapes."""
        parts = zip(flat.split(self._lengths), self._shapes, strict=True)
        if self._dims is None:
            return [part.view(shape) for part, shape in parts]
        views = []
        for (part, shape), dims in zip(parts, self._dims, strict=True):
            views.append(part.view([shape[dim] for dim in dims]).permute([dims.index(i) for i in range(len(dims))]))
        return views
