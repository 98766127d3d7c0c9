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
    """A bound parameter or a view of one, as a call's operand: its elements offset + sum_d i_d strides[d]."""

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

    def view(self, flat: Tensor) -> Tensor:
        """This view in each row of ``flat``, (rows, numel of the parameter), whose columns are adjacent."""
        strides = (flat.stride(0), *self.strides)
        return flat.as_strided((len(flat), *self.shape), strides, flat.storage_offset() + self.offset)

    def overlaps_itself(self) -> bool:
        """Whether an element of the parameter may be in several places of the view."""
        covered = 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride <= covered:
                return True
            covered += (size - 1) * stride
        return False

    def add_to(self, flat: Tensor, rows: Tensor) -> None:
        """Adds ``rows``, (rows, *shape), to this view in each row of ``flat``."""
        if not self.overlaps_itself():
            self.view(flat).add_(rows)
            return
        elements = torch.arange(flat.shape[1], device=flat.device)
        places = elements.as_strided(self.shape, self.strides, self.offset).flatten()
        flat.index_add_(1, places, rows.reshape(len(flat), len(places)).to(flat.dtype))


@dataclass(eq=False)
class Derived:
    """An operand with a gradient that is not a parameter. If samples share its elements, it was computed from
    parameters alone, and their per-sample gradients are taken through it."""


Operand = ParameterUse | Derived
