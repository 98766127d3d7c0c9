"""Directions in int8 with blockwise scales: about 1 byte for each element.

A parameter of shape (d0, ...) has rows of n / d0 elements, in row-major order. Each row is cut into blocks of L
consecutive elements, and a block has one scale:

    value = q * scale     scale ~ max |u| / 127 of the block     q = round(u / scale), in [-127, 127]

L is the largest divisor of the row's length that is at most ``LONGEST_BLOCK``. So no block crosses a row: shards of
dimension 0 and new rows have whole blocks. A vector's rows have one element each.

A scale is a float32 that is rounded up to 16 significant bits, so that value = q * scale is exact in float32. The
largest q of a block is 127 or -127, so quantising such values again gives the same q and the same scale. The values
are what a direction IS: curvatures and anchor projections belong to them. A block whose scale would be below the
smallest normal float32, 1.2e-38, is 0.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_BLOCK = 128


@functools.lru_cache(maxsize=4096)
def scales_shape(shape: Sequence[int]) -> torch.Size:
    """(rows, blocks of a row) of a parameter of this shape; a scalar is one row."""
    row = math.prod(shape[1:])
    length = next((length for length in range(min(row, LONGEST_BLOCK), 1, -1) if row % length == 0), 1)
    return torch.Size((shape[0] if shape else 1, row // length))


def quantised(u: Tensor) -> tuple[Tensor, Tensor]:
    """(q, int8 of the shape of ``u``; the scales, float32 of ``scales_shape``). NaN and infinity are in the scales."""
    shape = scales_shape(u.shape)
    if u.numel() == 0:
        return u.to(torch.int8), u.new_zeros(shape, dtype=torch.float32)
    blocks = u.reshape(*shape, -1).to(torch.promote_types(u.dtype, torch.float32))
    nearest = (blocks.abs().amax(-1).double() / 127).float()
    # The next float32 whose last 8 bits are zero.
    rounded_up = ((nearest.view(torch.int32) + 255) & ~255).view(torch.float32)
    scales = torch.where(nearest.isfinite(), rounded_up, nearest)
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    divisors = torch.where(scales == 0, math.inf, scales)[..., None]
    q = (blocks / divisors).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return q.reshape(u.shape), scales


def dequantised(q: Tensor, scales: Tensor) -> Tensor:
    """q * scale, float32 of the shape of ``q``, whose elements are in row-major order. Without scales ``q`` itself."""
    if scales.numel() == 0:
        return q if q.is_floating_point() else q.float()
    return (q.reshape(scales.numel(), -1) * scales.reshape(-1, 1)).reshape(q.shape)


class Int8Vector(NamedTuple):
    """A vector along parameters of P elements in all, parameter after parameter, each in row-major order."""

    q: Tensor  # (..., P) int8
    scales: Tensor  # (..., number of blocks) float32

    @classmethod
    def of(cls, flat: Tensor, shapes: Sequence[torch.Size]) -> "Int8Vector":
        """A (P,) or (K, P) tensor of values, stored along parameters of these shapes."""
        if flat.dim() == 2:
            return cls(*map(torch.stack, zip(*(cls.of(row, shapes) for row in flat), strict=True)))
        parts = flat.split([shape.numel() for shape in shapes])
        stored = [quantised(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        return cls(*(torch.cat([part.flatten() for part in column]) for column in zip(*stored, strict=True)))

    def split(self, shapes: Sequence[torch.Size]) -> tuple[list[Tensor], list[Tensor]]:
        """(q of each parameter, its scales), each (..., number of them)."""
        q = self.q.split([shape.numel() for shape in shapes], -1)
        return list(q), list(self.scales.split([scales_shape(shape).numel() for shape in shapes], -1))

    def floats(self, shapes: Sequence[torch.Size]) -> Tensor:
        """The values: (..., P) float32."""
        return torch.cat(list(map(dequantised, *self.split(shapes))), -1)

    def to(self, device: torch.device) -> "Int8Vector":
        return Int8Vector(*(tensor.to(device) for tensor in self))


def stored_values(flat: Tensor, shapes: Sequence[torch.Size], dtype: torch.dtype) -> Tensor:
    """What is left of (..., P) values along parameters of these shapes when they are stored in ``dtype``."""
    return Int8Vector.of(flat, shapes).floats(shapes) if dtype == torch.int8 else flat.to(dtype)
