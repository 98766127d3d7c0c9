"""How Triton kernels read and write a chunk of the flat vector: one program for each chunk.

A chunk is BLOCK consecutive flat elements, whatever tensors they lie in. Lane j of a program holds flat element
chunk * BLOCK + j and is multiplied, added and summed in the same place for a list and for a flat tensor. Reductions
have two stages and no atomics: one sum per chunk, then ``finish_kernel``. So results are bitwise the same from run to
run, and for a list and a flat tensor: kernels are not specialised on arguments that differ between those two, so both
run the same binary. Arithmetic is float64, or as good (``float64_arithmetic.py``), except AdamW's own, which is in its
parameters' dtype.

A view of the flat vector is a table of entries, one per segment (stride 1) or a single one (stride 0). An entry is
8 * origin + code: where flat element 0 would be, were the whole vector laid out like this segment, and the dtype.
DTYPES is the set of codes in a view, as bits; with one bit set, the code is known when a kernel is compiled.

Directions of which some are int8 have three entries per segment (stride 3): its own and, of int8 elements, the address
of the scales and the number of elements of a block, which have one scale.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl

# Codes of dtypes in Triton's tables, 3 bits: 0 float32, 1 float64, 2 bfloat16, 3 float16, 4 int8.

# 8 elements of a chunk for each of 256 threads: one 16-byte load of bfloat16, two of float32. Tests change it.
BLOCK = 2048
NUM_WARPS = 8

# The constants of kernels that hold the dtypes of a view.
VIEWS = ("PARAMS", "TARGETS", "DIRECTIONS", "STATE", "GRADIENTS", "ROUNDINGS")

# On NVIDIA, registers per thread: 64 lets four programs run on a multiprocessor at a time, 80 three, 128 two. Without
# a limit, ptxas aims for more programs and spills.
_REGISTERS = {
    "projections_kernel": 80,
    "combine_kernel": 80,
    "quadratic_kernel": 64,
    "gradient_kernel": 128,
    "shrink_kernel": 128,
    "low_rank_adamw_kernel": 128,
    "diagonal_adamw_kernel": 255,
}


def block(name: str) -> int:
    """Elements of a chunk. Half as many for AdamW, which holds those of four or more tensors at a time."""
    return BLOCK // 2 if "adamw" in name else BLOCK


def registers(name: str, constants: Mapping[str, int]) -> int:
    """Registers per thread of a kernel with these constants. Directions or targets of several dtypes, AdamW in
    float64 and products of pairs need more than usual."""
    if name == "low_rank_adamw_kernel" and constants["PARAMS"] != 1:
        return 255
    beside_int8 = constants.get("DIRECTIONS", 0) > 16
    if name == "projections_kernel" and (constants["PAIRS"] or beside_int8):
        return 128
    mixed = any(constants[view].bit_count() > 1 for view in ("TARGETS", "DIRECTIONS") if view in constants)
    return 128 if name == "combine_kernel" and mixed else _REGISTERS[name]


def pairs(constants: Mapping[str, int], slow_float64: bool) -> bool:
    """Whether a kernel with these constants computes with pairs of float32: not where a view has float64."""
    return slow_float64 and not any(constants.get(view, 0) & 2 for view in VIEWS)


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled once for all values and alignments of its arguments, because another binary might add
    lanes in another order."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])(function)


@triton.jit
def locate(begins: tl.tensor, firsts: tl.tensor, numel: tl.tensor, chunk: tl.tensor, BLOCK: tl.constexpr) -> tl.tuple:
    """The place of a chunk: (whether it lies in one segment, its first segment, each lane's segment, its first flat
    index, which lanes are within the vector).

    A lane's segment is the last that begins at or before it, by bisection among those that the chunk touches: a chunk
    of 4,000 tiny tensors takes 12 steps, and one within a segment none.
    """
    start = chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    first = tl.load(firsts + chunk)
    in_one_segment = tl.load(begins + first + 1) >= start + BLOCK
    segment = tl.zeros([BLOCK], tl.int32) + first
    candidates = tl.where(in_one_segment, 1, tl.load(firsts + chunk + 1) - first + 1)
    while candidates > 1:
        half = candidates // 2
        segment = tl.where(tl.load(begins + segment + half) <= start + lane, segment + half, segment)
        candidates -= half
    return in_one_segment, first, segment, start, lane < numel - start


@triton.jit
def elements(
    entry: tl.tensor, start: tl.tensor, CODE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Pointers to the BLOCK flat elements from ``start`` on, along one entry or one for each lane.

    From a 16-byte boundary on, and unmasked, they become 16-byte loads and stores. From a 4-byte boundary on, int8
    elements become 4-byte loads; so a thread has the same elements as of float32, and adds them in the same order. The
    boundary is declared here, because the compiler forgets one that is declared for a function's result.
    """
    if CODE == 0:
        origin = (entry >> 3).to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        origin = (entry >> 3).to(tl.pointer_type(tl.float64))
    elif CODE == 2:
        origin = (entry >> 3).to(tl.pointer_type(tl.bfloat16))
    elif CODE == 3:
        origin = (entry >> 3).to(tl.pointer_type(tl.float16))
    else:
        origin = (entry >> 3).to(tl.pointer_type(tl.int8))
    first = origin + start
    if ALIGNED:
        first = tl.multiple_of(first, 16 if CODE < 4 else 4)
    return first + tl.arange(0, BLOCK)


@triton.jit
def _is_aligned(entry: tl.tensor) -> tl.tensor:
    return ((entry >> 3) & 15) == 0  # chunks are multiples of 16 bytes long


@triton.jit
def zeros(DTYPES: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """In the dtype of a view, or in one that holds all dtypes of the view."""
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
def read(
    entries: tl.tensor, stride: tl.tensor, place: tl.tuple, DTYPES: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The chunk's elements of a view, 0 beyond its end. Not yet float64, so that several loads can be under way."""
    in_one_segment, first, segment, start, inside = place
    values = zeros(DTYPES, BLOCK)
    entry = tl.load(entries + first * stride)
    if in_one_segment & _is_aligned(entry):
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                values = tl.load(elements(entry, start, CODE, True, BLOCK))
            elif (DTYPES >> CODE) & 1:  # noqa: SIM102  (known when compiled, and the next when run)
                if (entry & 7) == CODE:
                    values = tl.load(elements(entry, start, CODE, True, BLOCK)).to(values.dtype)
    else:
        lane_entry = tl.load(entries + segment * stride)
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                values = tl.load(elements(lane_entry, start, CODE, False, BLOCK), mask=inside, other=0.0)
            elif (DTYPES >> CODE) & 1:
                selected = inside & ((lane_entry & 7) == CODE)
                loaded = tl.load(elements(lane_entry, start, CODE, False, BLOCK), mask=selected, other=0.0)
                values = tl.where(selected, loaded.to(values.dtype), values)
    return values


@triton.jit
def _dequantised(q: tl.tensor, scale: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """q * scale, exact: float32 with PAIRS, else float64, for which nothing is converted, as a multiprocessor converts
    little: q + 128 becomes the last mantissa bits of the upper half of 2^20."""
    if PAIRS:
        values = q.to(tl.float32) * scale
    else:
        high = (q.to(tl.int32) & 255) ^ 0x41300080
        values = ((high.to(tl.int64) << 32).to(tl.float64, bitcast=True) - 1048704.0) * scale.to(tl.float64)
    return values


@triton.jit
def segment_range(firsts: tl.tensor, place: tl.tuple) -> tl.tuple:
    """The first and the last segment that a chunk touches."""
    in_one_segment, first, _, _, _ = place
    last = first
    if in_one_segment == 0:
        last = tl.load(firsts + tl.program_id(0).to(tl.int64) + 1)
    return first, last


@triton.jit
def read_direction(
    begins: tl.tensor,
    firsts: tl.tensor,
    entries: tl.tensor,
    stride: tl.tensor,
    place: tl.tuple,
    DTYPES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The same for directions, of which some may be int8."""
    if DTYPES & 16 == 0:
        values = read(entries, stride, place, DTYPES, BLOCK)
    else:
        in_one_segment, first, segment, start, inside = place
        values = tl.zeros([BLOCK], tl.float32 if PAIRS else tl.float64)
        piece = entries + first * stride
        entry, length = tl.load(piece), tl.load(piece + 2)
        position = start - tl.load(begins + first)  # in the first segment
        # A block holds whole quartets at 4-byte boundaries, so few that 32 bits are enough to divide.
        quartets = in_one_segment & ((entry & 7) == 4) & (((length | position | (entry >> 3)) & 3) == 0)
        if quartets & ((length | position) < 1 << 32):
            quartet = (position >> 2).to(tl.int32) + tl.arange(0, BLOCK // 4)
            of_segment = tl.load(piece + 1).to(tl.pointer_type(tl.float32))
            of_quartet = tl.load(of_segment + quartet // (length >> 2).to(tl.int32))
            scale = tl.broadcast_to(tl.expand_dims(of_quartet, 1), [BLOCK // 4, 4]).reshape([BLOCK])
            values = _dequantised(tl.load(elements(entry, start, 4, True, BLOCK)), scale, PAIRS)
        else:
            if DTYPES != 16:
                values = read(entries, stride, place, DTYPES, BLOCK).to(values.dtype)
            index, last = segment_range(firsts, place)
            while index <= last:
                of_int8 = tl.load(entries + index * stride)
                if (of_int8 & 7) == 4:
                    selected = inside & (segment == index)
                    of_block = tl.load(entries + index * stride + 2)
                    # The chunk's begin in the segment: in elements, in blocks, and beyond these in elements again, as
                    # if the block had at most BLOCK elements, so that 32 bits are enough to divide.
                    behind = start - tl.load(begins + index)
                    before = tl.maximum(behind, 0) // of_block
                    short = tl.minimum(of_block, BLOCK).to(tl.int32)
                    beyond = tl.maximum(behind - before * of_block - of_block, -BLOCK).to(tl.int32) + short
                    scales = tl.load(entries + index * stride + 1).to(tl.pointer_type(tl.float32)) + before
                    block = (tl.arange(0, BLOCK) + beyond) // short
                    of_lanes = tl.load(scales + block, mask=selected, other=0.0)
                    q = tl.load(elements(of_int8, start, 4, False, BLOCK), mask=selected, other=0)
                    values += _dequantised(q, of_lanes, PAIRS)
                index += 1
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
def round_as(
    values: tl.tensor, entries: tl.tensor, stride: tl.tensor, index: tl.tensor, DTYPES: tl.constexpr
) -> tl.tensor:
    """Values as they are once a segment of a view holds them."""
    result = values
    code = tl.load(entries + index * stride) & 7
    for CODE in tl.static_range(4):
        if DTYPES == 1 << CODE:
            result = _round(values, CODE).to(values.dtype)
        elif (DTYPES >> CODE) & 1:
            result = tl.where(code == CODE, _round(values, CODE).to(values.dtype), result)
    return result


@triton.jit
def write(
    entries: tl.tensor, stride: tl.tensor, place: tl.tuple, values: tl.tensor, DTYPES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Float64 values into the chunk's elements of a view."""
    in_one_segment, first, segment, start, inside = place
    entry = tl.load(entries + first * stride)
    if in_one_segment & _is_aligned(entry):
        for CODE in tl.static_range(4):
            if DTYPES == 1 << CODE:
                tl.store(elements(entry, start, CODE, True, BLOCK), _round(values, CODE))
            elif (DTYPES >> CODE) & 1:  # noqa: SIM102  (known when compiled, and the next when run)
                if (entry & 7) == CODE:
                    tl.store(elements(entry, start, CODE, True, BLOCK), _round(values, CODE))
    else:
        lane_entry = tl.load(entries + segment * stride)
        for CODE in tl.static_range(4):
            if (DTYPES >> CODE) & 1:
                selected = inside & ((lane_entry & 7) == CODE)
                tl.store(elements(lane_entry, start, CODE, False, BLOCK), _round(values, CODE), mask=selected)
