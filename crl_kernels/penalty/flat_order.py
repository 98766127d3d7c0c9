"""In which order a history's flat vectors hold the elements of each parameter."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..backends.memory_order import order_of


class FlatOrder:
    """Parameter after parameter, each one's elements in the order of its own memory, so that kernels copy nothing."""

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
