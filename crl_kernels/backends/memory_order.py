"""The order in which memory holds a tensor's elements: row-major, channels_last, or any other.

Operators work element by element along a tensor, or sum over it. So a parameter and everything that goes with it
(gradient, moments, directions) may be read in any order that they share. A tensor is dense if its elements fill one
stretch of memory, each place once; a dense parameter is read in the order of its memory, any other in row-major order.
``csrc/operands.h`` has the same rule.
"""

from collections.abc import Sequence
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
