"""The penalties' Triton kernels, low-rank and diagonal. Operators in ``penalty.py`` launch them."""

import triton.language as tl

from .chunks import kernel, locate, read, read_direction, write
from .float64_arithmetic import (
    added,
    added_to,
    difference,
    dot,
    number,
    product,
    proximal_step,
    quadratic,
    rounded,
    scaled,
    zero,
)
from .reductions import row_sum

# The low-rank penalty.


@kernel
def projections_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    directions: tl.tensor,
    directions_stride: tl.tensor,
    pieces: tl.tensor,
    num_terms: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """partial[k, chunk] = u_k . theta over the chunk. theta is read once for all terms."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = read(parameters, parameters_stride, place, PARAMS, BLOCK)
    for _ in range(num_terms):
        u = read_direction(begins, firsts, directions, directions_stride, place, DIRECTIONS, PAIRS, BLOCK)
        tl.store(partial + chunk, dot(theta, u, PAIRS))
        directions += pieces
        partial += chunks


@kernel
def combine_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    targets: tl.tensor,
    targets_stride: tl.tensor,
    directions: tl.tensor,
    directions_stride: tl.tensor,
    pieces: tl.tensor,
    num_terms: tl.tensor,
    coefficients: tl.tensor,
    TARGETS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    OVERWRITE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """targets (+)= sum_k c_k u_k, rounded once."""
    place = locate(begins, firsts, numel, tl.program_id(0).to(tl.int64), BLOCK)
    total = zero(BLOCK, PAIRS)
    for k in range(num_terms):
        u = read_direction(begins, firsts, directions, directions_stride, place, DIRECTIONS, PAIRS, BLOCK)
        total = added(total, scaled(number(tl.load(coefficients + k), PAIRS), u, PAIRS), PAIRS)
        directions += pieces
    if OVERWRITE:
        values = rounded(total, PAIRS)
    else:
        values = added_to(read(targets, targets_stride, place, TARGETS, BLOCK), total, PAIRS)
    write(targets, targets_stride, place, values, TARGETS, BLOCK)


@kernel
def force_kernel(
    partial: tl.tensor,
    count: tl.tensor,
    curvatures: tl.tensor,
    anchor_projections: tl.tensor,
    coefficient: tl.tensor,
    force: tl.tensor,
    value: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    """force[k] = c a_k d_k and value[k] = (c / 2) a_k d_k^2, with the drift d_k = sum of partial[k, :] - b_k."""
    k = tl.program_id(0)
    drift = row_sum(partial, count, LANES) - tl.load(anchor_projections + k)
    pull = tl.load(coefficient) * (tl.load(curvatures + k) * drift)
    tl.store(force + k, pull)
    tl.store(value + k, 0.5 * pull * drift)


# The diagonal penalty.


@kernel
def quadratic_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    fisher: tl.tensor,
    fisher_stride: tl.tensor,
    anchor: tl.tensor,
    anchor_stride: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    STATE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """partial[chunk] = sum S (theta - m)^2 over the chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = read(parameters, parameters_stride, place, PARAMS, BLOCK)
    s = read(fisher, fisher_stride, place, STATE, BLOCK)
    m = read(anchor, anchor_stride, place, STATE, BLOCK)
    tl.store(partial + chunk, quadratic(s, difference(theta, m, PAIRS), PAIRS))


@kernel
def gradient_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    targets: tl.tensor,
    targets_stride: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    fisher: tl.tensor,
    fisher_stride: tl.tensor,
    anchor: tl.tensor,
    anchor_stride: tl.tensor,
    coefficient: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    STATE: tl.constexpr,
    OVERWRITE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """targets = c S (theta - m); or targets += that and partial[chunk] = sum S (theta - m)^2, in one pass. A target has
    its parameter's dtype."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = read(parameters, parameters_stride, place, PARAMS, BLOCK)
    s = read(fisher, fisher_stride, place, STATE, BLOCK)
    m = read(anchor, anchor_stride, place, STATE, BLOCK)
    distance = difference(theta, m, PAIRS)
    slope = product(scaled(distance, s, PAIRS), number(tl.load(coefficient), PAIRS), PAIRS)
    if OVERWRITE:
        write(targets, targets_stride, place, rounded(slope, PAIRS), PARAMS, BLOCK)
    else:
        target = read(targets, targets_stride, place, PARAMS, BLOCK)
        write(targets, targets_stride, place, added_to(target, slope, PAIRS), PARAMS, BLOCK)
        tl.store(partial + chunk, quadratic(s, distance, PAIRS))


@kernel
def shrink_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    fisher: tl.tensor,
    fisher_stride: tl.tensor,
    anchor: tl.tensor,
    anchor_stride: tl.tensor,
    strength: tl.tensor,
    PARAMS: tl.constexpr,
    STATE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """theta <- theta - w (theta - m), with the proximal weight w."""
    place = locate(begins, firsts, numel, tl.program_id(0).to(tl.int64), BLOCK)
    theta = read(parameters, parameters_stride, place, PARAMS, BLOCK)
    s = read(fisher, fisher_stride, place, STATE, BLOCK)
    m = read(anchor, anchor_stride, place, STATE, BLOCK)
    moved = proximal_step(theta, s, m, tl.load(strength), PAIRS)
    write(parameters, parameters_stride, place, moved, PARAMS, BLOCK)
