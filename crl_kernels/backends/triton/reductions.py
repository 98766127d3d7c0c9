"""The second stage of reductions in Triton: one program adds each row of partial sums, in order."""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import NUM_WARPS, kernel

LANES = 2048  # partial sums that are added at once


@triton.jit
def row_sum(partial: tl.tensor, count: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """The sum of this program's row of ``count`` partial sums."""
    row = partial + tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([LANES], tl.float64)
    for begin in range(0, count, LANES):
        lane = begin + tl.arange(0, LANES)
        total += tl.load(row + lane, mask=lane < count, other=0.0)
    return tl.sum(total, axis=0)


@kernel
def finish_kernel(partial: tl.tensor, count: tl.tensor, result: tl.tensor, LANES: tl.constexpr) -> None:
    """result[k] = sum of partial[k, :]"""
    tl.store(result + tl.program_id(0), row_sum(partial, count, LANES))


def finish(partial: Tensor, result: Tensor) -> Tensor:
    """result = partial.sum(-1)"""
    if result.numel() > 0:
        finish_kernel[(result.numel(),)](partial, partial.shape[-1], result, LANES=LANES, num_warps=NUM_WARPS)
    return result
