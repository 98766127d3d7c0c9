"""Operands whose per-sample gradients are taken: bound parameters, views of them, and tensors made of them alone."""

from dataclasses import dataclass

import torch
from torch import Tensor


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """In elements, of a tensor in row-major order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


@dataclass(eq=False)
class ParameterUse:
    """A bound parameter, or the view of one that a call took: elements offset + sum_d i_d strides[d] of it."""

    index: int  # of the parameter
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def overlaps(self, other: "ParameterUse") -> bool:
        (first, last), (start, stop) = self._extent(), other._extent()
        return first < stop and start < last

    def _extent(self) -> tuple[int, int]:
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + span + 1 if self.shape.numel() else self.offset

    def of(self, whole: Tensor) -> Tensor:
        """The same view of each row of (rows, numel of the parameter), whose columns are adjacent."""
        strides = (whole.stride(0), *self.strides)
        return whole.as_strided((len(whole), *self.shape), strides, whole.storage_offset() + self.offset)

    def overlaps_itself(self) -> bool:
        """Whether an element of the parameter may be in several places of the view."""
        covered = 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride <= covered:
                return True
            covered += (size - 1) * stride
        return False

    def add_to(self, whole: Tensor, rows: Tensor) -> None:
        """Adds (rows, *shape) to the same view of each row of ``whole``, as in ``of``."""
        if not self.overlaps_itself():
            self.of(whole).add_(rows)
            return
        elements = torch.arange(whole.shape[1], device=whole.device)
        places = elements.as_strided(self.shape, self.strides, self.offset).flatten()
        whole.index_add_(1, places, rows.reshape(len(whole), len(places)).to(whole.dtype))


@dataclass(eq=False)
class Derived:
    """A tensor with a gradient that is no parameter, where a call has its parameter: if several samples share its
    elements, it is made of parameters alone there, and their per-sample gradients go through it."""


Operand = ParameterUse | Derived
