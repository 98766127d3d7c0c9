"""The Triton kernels: one program for each chunk of the flat vector, all arithmetic in float64, but for
AdamW's own, which is in its parameters' dtype.

A chunk is BLOCK consecutive flat elements, whatever tensors they lie in. Lane j of a program holds flat element
chunk * BLOCK + j and is multiplied, added and summed in the same place for a list and for a flat tensor. Reductions
have two stages and no atomics: one sum per chunk, then ``finish_kernel``. So results are bitwise the same from run to
run, and for a list and a flat tensor: arguments that differ between those two are never specialised on, so both run the
same binary.

A view of the flat vector is a table of entries, one per segment (stride 1) or a single one (stride 0). An entry is
4 * origin + code: where flat element 0 would be, were the whole vector laid out like this segment, and the dtype.
DTYPES is the set of codes in a view, as bits; with one bit set, no code is looked at.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl

# Codes of dtypes, as in csrc/core/segments.h: 0 float32, 1 float64, 2 bfloat16, 3 float16.

# 8 elements of a chunk for each of 256 threads: one 16-byte load of bfloat16, two of float32. Tests make it smaller.
BLOCK = 2048
NUM_WARPS = 8

# On NVIDIA, registers per thread: 64 lets four programs run on a multiprocessor at a time, 80 three, 128 two. Left to
# itself, ptxas aims for more of them and spills.
_REGISTERS = {
    "projections_kernel": 80,
    "combine_kernel": 80,
    "quadratic_kernel": 64,
    "gradient_kernel": 128,
    "shrink_kernel": 128,
    "low_rank_adamw_kernel": 128,
    "diagonal_adamw_kernel": 255,
}


def block(kernel: str) -> int:
    """Elements of a chunk. Half as many for AdamW, which holds four or more tensors' at a time."""
    return BLOCK // 2 if "adamw" in kernel else BLOCK


def registers(kernel: str, constants: Mapping[str, int]) -> int:
    """For a kernel with these constants: a sum into tensors of several dtypes needs more, and AdamW in float64."""
    if kernel == "low_rank_adamw_kernel" and constants["PARAMS"] != 1:
        return 255
    mixed = any(constants[view].bit_count() > 1 for view in ("TARGETS", "DIRECTIONS") if view in constants)
    return 128 if kernel == "combine_kernel" and mixed else _REGISTERS[kernel]


def _kernel(function: Callable[..., None]) -> Any:
    """A kernel that is not compiled anew for values or alignments of its arguments: see the head of the file."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])(function)


# Where flat elements are.


@triton.jit
def locate(begins: tl.tensor, firsts: tl.tensor, numel: tl.tensor, chunk: tl.tensor, BLOCK: tl.constexpr) -> tl.tuple:
    """The place of a chunk: (is it within one segment, its first segment, each lane's segment, its first flat index,
    which lanes are within the vector).

    A lane's segment is the last that begins at or before it, by bisection among those that the chunk touches: a chunk
    of 4,000 tiny tensors takes 12 steps, and one within a segment none.
    """
    start = chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    first = tl.load(firsts + chunk)
    whole = tl.load(begins + first + 1) >= start + BLOCK
    segment = tl.zeros([BLOCK], tl.int32) + first
    candidates = tl.where(whole, 1, tl.load(firsts + chunk + 1) - first + 1)
    while candidates > 1:
        half = candidates // 2
        segment = tl.where(tl.load(begins + segment + half) <= start + lane, segment + half, segment)
        candidates -= half
    return whole, first, segment, start, lane < numel - start


@triton.jit
def elements(
    entry: tl.tensor, start: tl.tensor, CODE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Pointers to the BLOCK flat elements from ``start`` on, along one entry or one for each lane.

    From a 16-byte boundary on, and unmasked, they become 16-byte loads and stores. The compiler forgets a boundary that
    is declared of what a function returned.
    """
    if CODE == 0:
        origin = (entry >> 2).to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        origin = (entry >> 2).to(tl.pointer_type(tl.float64))
    elif CODE == 2:
        origin = (entry >> 2).to(tl.pointer_type(tl.bfloat16))
    else:
        origin = (entry >> 2).to(tl.pointer_type(tl.float16))
    first = origin + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, BLOCK)


@triton.jit
def _is_aligned(entry: tl.tensor) -> tl.tensor:
    return ((entry >> 2) & 15) == 0  # chunks are multiples of 16 bytes long


@triton.jit
def _zeros(DTYPES: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Of the one dtype of a view, or of one that holds all of its dtypes."""
    if DTYPES == 4:
        zeros = tl.zeros([BLOCK], tl.bfloat16)
    elif DTYPES == 8:
        zeros = tl.zeros([BLOCK], tl.float16)
    elif DTYPES & 2:
        zeros = tl.zeros([BLOCK], tl.float64)
    else:
        zeros = tl.zeros([BLOCK], tl.float32)
    return zeros


@triton.jit
def _read(
    entries: tl.tensor, stride: tl.tensor, place: tl.tuple, DTYPES: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The chunk's elements of a view, 0 beyond its end. Not float64 yet, so that several loads can be under way."""
    whole, first, segment, start, inside = place
    values = _zeros(DTYPES, BLOCK)
    entry = tl.load(entries + first * stride)
    if whole & _is_aligned(entry):
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                values = tl.load(elements(entry, start, CODE, True, BLOCK))
            elif (DTYPES >> CODE) & 1:  # noqa: SIM102  (known when compiled, and the next when run)
                if (entry & 3) == CODE:
                    values = tl.load(elements(entry, start, CODE, True, BLOCK)).to(values.dtype)
    else:
        lane_entry = tl.load(entries + segment * stride)
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                values = tl.load(elements(lane_entry, start, CODE, False, BLOCK), mask=inside, other=0.0)
            elif (DTYPES >> CODE) & 1:
                mine = inside & ((lane_entry & 3) == CODE)
                loaded = tl.load(elements(lane_entry, start, CODE, False, BLOCK), mask=mine, other=0.0)
                values = tl.where(mine, loaded.to(values.dtype), values)
    return values


@triton.jit
def _round(values: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    """From float64 to a dtype, through float32 for 16-bit dtypes, as PyTorch does."""
    if CODE == 0:
        rounded = values.to(tl.float32)
    elif CODE == 1:
        rounded = values
    elif CODE == 2:
        rounded = values.to(tl.float32).to(tl.bfloat16)
    else:
        rounded = values.to(tl.float32).to(tl.float16)
    return rounded


@triton.jit
def _write(
    entries: tl.tensor, stride: tl.tensor, place: tl.tuple, values: tl.tensor, DTYPES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Float64 values into the chunk's elements of a view."""
    whole, first, segment, start, inside = place
    entry = tl.load(entries + first * stride)
    if whole & _is_aligned(entry):
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                tl.store(elements(entry, start, CODE, True, BLOCK), _round(values, CODE))
            elif (DTYPES >> CODE) & 1:  # noqa: SIM102  (known when compiled, and the next when run)
                if (entry & 3) == CODE:
                    tl.store(elements(entry, start, CODE, True, BLOCK), _round(values, CODE))
    else:
        lane_entry = tl.load(entries + segment * stride)
        for CODE in tl.static_range(4):
            if (DTYPES >> CODE) & 1:
                mine = inside & ((lane_entry & 3) == CODE)
                tl.store(elements(lane_entry, start, CODE, False, BLOCK), _round(values, CODE), mask=mine)


# The low-rank penalty.


@_kernel
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
    BLOCK: tl.constexpr,
) -> None:
    """partial[k, chunk] = u_k . theta over the chunk. theta is read once for all terms."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = _read(parameters, parameters_stride, place, PARAMS, BLOCK)
    for _ in range(num_terms):
        u = _read(directions, directions_stride, place, DIRECTIONS, BLOCK)
        tl.store(partial + chunk, tl.sum(theta.to(tl.float64) * u.to(tl.float64), axis=0))
        directions += pieces
        partial += chunks


@_kernel
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
    BLOCK: tl.constexpr,
) -> None:
    """targets (+)= sum_k c_k u_k, rounded once."""
    place = locate(begins, firsts, numel, tl.program_id(0).to(tl.int64), BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(num_terms):
        u = _read(directions, directions_stride, place, DIRECTIONS, BLOCK)
        total += tl.load(coefficients + k) * u.to(tl.float64)
        directions += pieces
    if not OVERWRITE:
        total += _read(targets, targets_stride, place, TARGETS, BLOCK).to(tl.float64)
    _write(targets, targets_stride, place, total, TARGETS, BLOCK)


# The diagonal penalty.


@_kernel
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
    BLOCK: tl.constexpr,
) -> None:
    """partial[chunk] = sum S (theta - m)^2 over the chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = _read(parameters, parameters_stride, place, PARAMS, BLOCK)
    s = _read(fisher, fisher_stride, place, STATE, BLOCK)
    m = _read(anchor, anchor_stride, place, STATE, BLOCK)
    distance = theta.to(tl.float64) - m.to(tl.float64)
    tl.store(partial + chunk, tl.sum(s.to(tl.float64) * distance * distance, axis=0))


@_kernel
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
    BLOCK: tl.constexpr,
) -> None:
    """targets = c S (theta - m); or targets += that and partial[chunk] = sum S (theta - m)^2, in one pass. A target has
    its parameter's dtype."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    theta = _read(parameters, parameters_stride, place, PARAMS, BLOCK)
    s = _read(fisher, fisher_stride, place, STATE, BLOCK)
    m = _read(anchor, anchor_stride, place, STATE, BLOCK)
    c = tl.load(coefficient)
    if OVERWRITE:
        slope = s.to(tl.float64) * (theta.to(tl.float64) - m.to(tl.float64))
        _write(targets, targets_stride, place, c * slope, PARAMS, BLOCK)
    else:
        target = _read(targets, targets_stride, place, PARAMS, BLOCK)
        distance = theta.to(tl.float64) - m.to(tl.float64)
        slope = s.to(tl.float64) * distance
        _write(targets, targets_stride, place, target.to(tl.float64) + c * slope, PARAMS, BLOCK)
        tl.store(partial + chunk, tl.sum(slope * distance, axis=0))


@triton.jit
def _proximal_weight(s: tl.tensor, strength: tl.tensor) -> tl.tensor:
    """strength S / (1 + strength S); 0 where S = 0, 1 where it is infinite."""
    x = tl.where(s == 0.0, 0.0, s * strength)
    x = tl.where(x > 1.7976931348623157e308, 1.7976931348623157e308, x)  # NaN is kept
    return x / (1.0 + x)


@_kernel
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
    BLOCK: tl.constexpr,
) -> None:
    """theta <- theta - w (theta - m), with the proximal weight w."""
    place = locate(begins, firsts, numel, tl.program_id(0).to(tl.int64), BLOCK)
    theta = _read(parameters, parameters_stride, place, PARAMS, BLOCK).to(tl.float64)
    s = _read(fisher, fisher_stride, place, STATE, BLOCK).to(tl.float64)
    m = _read(anchor, anchor_stride, place, STATE, BLOCK).to(tl.float64)
    w = _proximal_weight(s, tl.load(strength))
    _write(parameters, parameters_stride, place, theta - w * (theta - m), PARAMS, BLOCK)


# AdamW. A tensor has one row of settings, so a chunk goes from segment to segment: one, but for small tensors.


@triton.jit
def _segments_of(firsts: tl.tensor, place: tl.tuple) -> tl.tuple:
    """The first and the last segment that a chunk touches."""
    whole, first, _, _, _ = place
    last = first
    if whole == 0:
        last = tl.load(firsts + tl.program_id(0).to(tl.int64) + 1)
    return first, last


@triton.jit
def _within(place: tl.tuple, index: tl.tensor) -> tl.tuple:
    """The part of a place that lies in one segment, and which lanes these are."""
    whole, first, segment, start, inside = place
    mine = inside & (segment == index)
    return (whole, first, segment, start, mine), mine


@triton.jit
def _adamw(row: tl.tensor, theta: tl.tensor, gradient: tl.tensor, m: tl.tensor, v: tl.tensor) -> tl.tuple:
    """(theta, m, v) after a step along ``gradient``, in theta's dtype; see ``reference.low_rank_adamw_``."""
    beta1, beta2 = tl.load(row + 1), tl.load(row + 2)
    first = m + (1 - beta1).to(m.dtype) * (gradient - m)
    second = beta2.to(v.dtype) * v + (1 - beta2).to(v.dtype) * gradient * gradient
    root = tl.load(row + 5).to(v.dtype) * tl.sqrt(second) + tl.load(row + 6).to(v.dtype)
    moved = tl.load(row + 3).to(theta.dtype) * theta - tl.load(row + 4).to(theta.dtype) * (first / root)
    return moved, first, second


@_kernel
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
    DIRECTIONS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A step of AdamW, and partial[k, chunk] = u_k . theta after it. What is read of u_k the second time is in L2."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    keep = tl.load(found_inf) > 0
    total = tl.zeros([BLOCK], tl.float64)
    term = directions
    for k in range(num_terms):
        u = _read(term, directions_stride, place, DIRECTIONS, BLOCK)
        total += tl.load(coefficients + k) * u.to(tl.float64)
        term += pieces

    result = _zeros(PARAMS, BLOCK)
    index, last = _segments_of(firsts, place)
    while index <= last:
        here, mine = _within(place, index)
        theta = _read(parameters, parameters_stride, here, PARAMS, BLOCK)
        gradient = _read(gradients, gradients_stride, here, GRADIENTS, BLOCK).to(theta.dtype)
        m = _read(exp_avgs, exp_avgs_stride, here, PARAMS, BLOCK)
        v = _read(exp_avg_sqs, exp_avg_sqs_stride, here, PARAMS, BLOCK)
        row = settings + index.to(tl.int64) * 8
        pull = (tl.load(row + 7) * total).to(theta.dtype)
        gradient = tl.load(row).to(theta.dtype) * gradient
        if DECOUPLED:
            moved, m, v = _adamw(row, theta + pull, gradient, m, v)
        else:
            moved, m, v = _adamw(row, theta, gradient + pull, m, v)
        if PARAMS == 3:  # in float64, as the widest; what is projected is what is stored
            stored = moved.to(tl.float32).to(tl.float64)
            moved = tl.where((tl.load(parameters + index * parameters_stride) & 3) == 0, stored, moved)
        moved = tl.where(keep, theta, moved)
        result = tl.where(mine, moved, result)
        if keep == 0:
            _write(parameters, parameters_stride, here, moved, PARAMS, BLOCK)
            _write(exp_avgs, exp_avgs_stride, here, m, PARAMS, BLOCK)
            _write(exp_avg_sqs, exp_avg_sqs_stride, here, v, PARAMS, BLOCK)
        index += 1

    for _ in range(num_terms):
        u = _read(directions, directions_stride, place, DIRECTIONS, BLOCK)
        tl.store(partial + chunk, tl.sum(result.to(tl.float64) * u.to(tl.float64), axis=0))
        directions += pieces
        partial += chunks


@_kernel
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
    settings: tl.tensor,
    found_inf: tl.tensor,
    fisher: tl.tensor,
    fisher_stride: tl.tensor,
    anchor: tl.tensor,
    anchor_stride: tl.tensor,
    partial: tl.tensor,
    PARAMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    STATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A step of AdamW with the diagonal penalty, and partial[chunk] = sum S (theta - m)^2 before it."""
    chunk = tl.program_id(0).to(tl.int64)
    place = locate(begins, firsts, numel, chunk, BLOCK)
    keep = tl.load(found_inf) > 0
    squares = tl.zeros([BLOCK], tl.float64)
    index, last = _segments_of(firsts, place)
    while index <= last:
        here, mine = _within(place, index)
        theta = _read(parameters, parameters_stride, here, PARAMS, BLOCK)
        gradient = _read(gradients, gradients_stride, here, GRADIENTS, BLOCK).to(theta.dtype)
        m = _read(exp_avgs, exp_avgs_stride, here, PARAMS, BLOCK)
        v = _read(exp_avg_sqs, exp_avg_sqs_stride, here, PARAMS, BLOCK)
        s = _read(fisher, fisher_stride, here, STATE, BLOCK).to(tl.float64)
        distance = theta.to(tl.float64) - _read(anchor, anchor_stride, here, STATE, BLOCK).to(tl.float64)
        slope = s * distance
        squares = tl.where(mine, slope * distance, squares)
        row = settings + index.to(tl.int64) * 8
        gradient = tl.load(row).to(theta.dtype) * gradient
        if DECOUPLED:
            start = theta.to(tl.float64) - _proximal_weight(s, tl.load(row + 7)) * distance
            moved, m, v = _adamw(row, start.to(theta.dtype), gradient, m, v)
        else:
            moved, m, v = _adamw(row, theta, gradient + (tl.load(row + 7) * slope).to(theta.dtype), m, v)
        if keep == 0:
            _write(parameters, parameters_stride, here, moved, PARAMS, BLOCK)
            _write(exp_avgs, exp_avgs_stride, here, m, PARAMS, BLOCK)
            _write(exp_avg_sqs, exp_avg_sqs_stride, here, v, PARAMS, BLOCK)
        index += 1
    tl.store(partial + chunk, tl.sum(squares, axis=0))


# The second stage of reductions: one program for each row of partial sums.


@triton.jit
def _row_sum(partial: tl.tensor, count: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """The sum of this program's row of ``count`` partial sums."""
    row = partial + tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([LANES], tl.float64)
    for begin in range(0, count, LANES):
        lane = begin + tl.arange(0, LANES)
        total += tl.load(row + lane, mask=lane < count, other=0.0)
    return tl.sum(total, axis=0)


@_kernel
def finish_kernel(partial: tl.tensor, count: tl.tensor, result: tl.tensor, LANES: tl.constexpr) -> None:
    """result[k] = sum of partial[k, :]"""
    tl.store(result + tl.program_id(0), _row_sum(partial, count, LANES))


@_kernel
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
    drift = _row_sum(partial, count, LANES) - tl.load(anchor_projections + k)
    pull = tl.load(coefficient) * (tl.load(curvatures + k) * drift)
    tl.store(force + k, pull)
    tl.store(value + k, 0.5 * pull * drift)
