"""AdamW's Triton kernels, with the penalty inside the step. Operators in ``adamw.py`` launch them.

A tensor has one row of settings, so a program goes through the segments that its chunk touches, one after the other.
"""

import triton
import triton.language as tl

from ..reference import ADAMW_COLUMNS
from .chunks import kernel, locate, read, read_direction, round_as, segment_range, write, zeros
from .float64_arithmetic import (
    added,
    difference,
    dot,
    number,
    product,
    proximal_step,
    quadratic,
    rounded,
    scaled,
    where,
    zero,
)

# Kernels take global numbers as constexpr only.
FACTOR = tl.constexpr(ADAMW_COLUMNS.factor)
BETA1 = tl.constexpr(ADAMW_COLUMNS.beta1)
BETA2 = tl.constexpr(ADAMW_COLUMNS.beta2)
DECAY = tl.constexpr(ADAMW_COLUMNS.decay)
STEP_SIZE = tl.constexpr(ADAMW_COLUMNS.step_size)
ROOT_SCALE = tl.constexpr(ADAMW_COLUMNS.root_scale)
EPS = tl.constexpr(ADAMW_COLUMNS.eps)
SHARE = tl.constexpr(ADAMW_COLUMNS.share)
COLUMNS = tl.constexpr(len(ADAMW_COLUMNS))


@triton.jit
def _restrict(place: tl.tuple, index: tl.tensor) -> tl.tuple:
    """The part of a place that lies in one segment, and its lanes."""
    in_one_segment, first, segment, start, inside = place
    selected = inside & (segment == index)
    return (in_one_segment, first, segment, start, selected), selected


@triton.jit
def _root(x: tl.tensor) -> tl.tensor:
    """The square root, correctly rounded; ``tl.sqrt`` is approximate in float32."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, correctly rounded; ``/`` is approximate in float32."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _adamw(row: tl.tensor, theta: tl.tensor, gradient: tl.tensor, m: tl.tensor, v: tl.tensor) -> tl.tuple:
    """(theta, m, v) after a step along ``gradient``, in theta's dtype; see ``reference.low_rank_adamw_``."""
    beta1, beta2 = tl.load(row + BETA1), tl.load(row + BETA2)
    first = m + (1 - beta1).to(m.dtype) * (gradient - m)
    second = beta2.to(v.dtype) * v + (1 - beta2).to(v.dtype) * gradient * gradient
    root = tl.load(row + ROOT_SCALE).to(v.dtype) * _root(second) + tl.load(row + EPS).to(v.dtype)
    step = tl.load(row + STEP_SIZE).to(theta.dtype) * _quotient(first, root)
    theta = tl.load(row + DECAY).to(theta.dtype) * theta - step
    return theta, first, second


@kernel
def low_rank_adamw_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    gradients: tl.tensor,
    gradients_stride: tl.tensor,
    exp_avgs: tl.tensor,
    exp_avgs_stride: tl.tensor,
    exp_avg_sqs: tl.tensor,
    exp_avg_sqs_stride: tl.tensor,
    roundings: tl.tensor,
    roundings_stride: tl.tensor,
    settings: tl.tensor,
    found_inf: tl.tensor,
    directions: tl.tensor,
    directions_stride: tl.tensor,
    pieces: tl.tensor,
    num_terms: tl.tensor,
    coefficients: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ROUNDINGS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A step of AdamW, and partial[k, chunk] = u_k . theta after it. The second reading of u_k is from L2."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    skip = tl.load(found_inf) > 0
    total = zero(BLOCK, PAIRS)
    term = directions
    for k in range(num_terms):
        u = read_direction(begins, firsts, term, directions_stride, place, DIRECTIONS, PAIRS, BLOCK)
        total = added(total, scaled(number(tl.load(coefficients + k), PAIRS), u, PAIRS), PAIRS)
        term += pieces

    result = zeros(PARAMS, BLOCK)
    index, last = segment_range(firsts, place)
    while index <= last:
        part, selected = _restrict(place, index)
        theta = read(parameters, parameters_stride, part, PARAMS, BLOCK)
        gradient = read(gradients, gradients_stride, part, GRADIENTS, BLOCK).to(theta.dtype)
        if ROUNDINGS:
            written = read(roundings, roundings_stride, part, ROUNDINGS, BLOCK).to(theta.dtype)
            nearest = round_as(theta, roundings, roundings_stride, index, ROUNDINGS)
            theta = tl.where(skip, theta, tl.where(nearest == written, theta, written))
        m = read(exp_avgs, exp_avgs_stride, part, PARAMS, BLOCK)
        v = read(exp_avg_sqs, exp_avg_sqs_stride, part, PARAMS, BLOCK)
        row = settings + index.to(tl.int64) * COLUMNS
        share = number(tl.load(row + SHARE), PAIRS)
        pull = rounded(product(total, share, PAIRS), PAIRS).to(theta.dtype)
        gradient = tl.load(row + FACTOR).to(theta.dtype) * gradient
        if DECOUPLED:
            stepped, m, v = _adamw(row, theta + pull, gradient, m, v)
        else:
            stepped, m, v = _adamw(row, theta, gradient + pull, m, v)
        if PARAMS == 3:  # computed in float64; the projection is of theta as it is stored
            stored = stepped.to(tl.float32).to(tl.float64)
            stepped = tl.where((tl.load(parameters + index * parameters_stride) & 7) == 0, stored, stepped)
        stepped = tl.where(skip, theta, stepped)
        result = tl.where(selected, stepped, result)
        if skip == 0:
            write(parameters, parameters_stride, part, stepped, PARAMS, BLOCK)
            write(exp_avgs, exp_avgs_stride, part, m, PARAMS, BLOCK)
            write(exp_avg_sqs, exp_avg_sqs_stride, part, v, PARAMS, BLOCK)
            if ROUNDINGS:
                write(roundings, roundings_stride, part, stepped, ROUNDINGS, BLOCK)
        index += 1

    for _ in range(num_terms):
        u = read_direction(begins, firsts, directions, directions_stride, place, DIRECTIONS, PAIRS, BLOCK)
        tl.store(partial + chunk, dot(result, u, PAIRS))
        directions += pieces
        partial += chunks


@kernel
def diagonal_adamw_kernel(
    begins: tl.tensor,
    firsts: tl.tensor,
    numel: tl.tensor,
    parameters: tl.tensor,
    parameters_stride: tl.tensor,
    gradients: tl.tensor,
    gradients_stride: tl.tensor,
    exp_avgs: tl.tensor,
    exp_avgs_stride: tl.tensor,
    exp_avg_sqs: tl.tensor,
    exp_avg_sqs_stride: tl.tensor,
    roundings: tl.tensor,
    roundings_stride: tl.tensor,
    settings: tl.tensor,
    found_inf: tl.tensor,
    fisher: tl.tensor,
    fisher_stride: tl.tensor,
    anchor: tl.tensor,
    anchor_stride: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ROUNDINGS: tl.constexpr,
    STATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A step of AdamW with the diagonal penalty, and partial[chunk] = sum S (theta - m)^2 before it."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    skip = tl.load(found_inf) > 0
    # Of all lanes, for the sum of squares.
    all_s, distances = zeros(STATE, BLOCK), zero(BLOCK, PAIRS)
    index, last = segment_range(firsts, place)
    while index <= last:
        part, selected = _restrict(place, index)
        theta = read(parameters, parameters_stride, part, PARAMS, BLOCK)
        gradient = read(gradients, gradients_stride, part, GRADIENTS, BLOCK).to(theta.dtype)
        if ROUNDINGS:
            written = read(roundings, roundings_stride, part, ROUNDINGS, BLOCK).to(theta.dtype)
            nearest = round_as(theta, roundings, roundings_stride, index, ROUNDINGS)
            theta = tl.where(skip, theta, tl.where(nearest == written, theta, written))
        m = read(exp_avgs, exp_avgs_stride, part, PARAMS, BLOCK)
        v = read(exp_avg_sqs, exp_avg_sqs_stride, part, PARAMS, BLOCK)
        s = read(fisher, fisher_stride, part, STATE, BLOCK)
        old = read(anchor, anchor_stride, part, STATE, BLOCK)
        distance = difference(theta, old, PAIRS)
        all_s = tl.where(selected, s, all_s)
        distances = where(selected, distance, distances, PAIRS)
        row = settings + index.to(tl.int64) * COLUMNS
        share = tl.load(row + SHARE)
        gradient = tl.load(row + FACTOR).to(theta.dtype) * gradient
        if DECOUPLED:
            start = proximal_step(theta, s, old, share, PAIRS).to(theta.dtype)
            stepped, m, v = _adamw(row, start, gradient, m, v)
        else:
            pull = rounded(product(scaled(distance, s, PAIRS), number(share, PAIRS), PAIRS), PAIRS).to(theta.dtype)
            stepped, m, v = _adamw(row, theta, gradient + pull, m, v)
        if skip == 0:
            write(parameters, parameters_stride, part, stepped, PARAMS, BLOCK)
            write(exp_avgs, exp_avgs_stride, part, m, PARAMS, BLOCK)
            write(exp_avg_sqs, exp_avg_sqs_stride, part, v, PARAMS, BLOCK)
            if ROUNDINGS:
                write(roundings, roundings_stride, part, stepped, ROUNDINGS, BLOCK)
        index += 1
    tl.store(partial + chunk, quadratic(all_s, distances, PAIRS))
