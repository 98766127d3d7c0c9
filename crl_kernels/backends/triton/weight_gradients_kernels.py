"""The Triton kernels for per-sample weight gradients of convolutions. ``weight_gradients.py`` launches them.

An implicit matrix product, whose inner loop is one sample's pixels: with j = (kernel offset, input channel),

    g_i[o, j] = sum_p b_i[o, p] a_i[j, p]        p: output pixels; a_i[j, p]: the input at p and j's offset

A program owns one tile of (o, j) and a run of samples. The tile of one sample stays in registers, becomes that
sample's share of a square norm and of projections, is added to the sum, and is never written.

Sums over samples lie as (run, o, j) until ``sum_kernel`` adds the runs in order and puts j in the weight's order.
There are no atomics, so results are bitwise the same from run to run. Nothing here has run on a GPU yet.
"""

import triton
import triton.language as tl

# Kernels are not specialised on these numbers: separate binaries for 1 and for multiples of 16 are no faster, and each
# takes 1 to 2 s to compile.
_PLAIN = ["samples", "run_length", "height", "width", "out_tiles", "column_tiles", "tiles"]


@triton.jit(do_not_specialize=_PLAIN)
def weight_gradient_kernel(
    input: tl.tensor,
    grad_output: tl.tensor,
    input_sample: tl.tensor,  # strides
    input_channel: tl.tensor,
    input_y: tl.tensor,
    input_x: tl.tensor,
    grad_sample: tl.tensor,
    grad_channel: tl.tensor,
    grad_y: tl.tensor,
    grad_x: tl.tensor,
    samples: tl.tensor,
    run_length: tl.tensor,
    in_channels: tl.tensor,  # of a group
    out_channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_width: tl.tensor,
    pixels: tl.tensor,
    kernel_width: tl.tensor,
    offsets: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    out_tiles: tl.tensor,
    column_tiles: tl.tensor,
    tiles: tl.tensor,
    numel: tl.tensor,
    directions: tl.tensor,
    num_terms: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    norms: tl.tensor,
    dots: tl.tensor,
    SUMS: tl.constexpr,
    SQUARES: tl.constexpr,
    PROJECT: tl.constexpr,
    JOINT: tl.constexpr,
    INPUT_ROWS_JOIN: tl.constexpr,
    GRAD_ROWS_JOIN: tl.constexpr,
    PADDED: tl.constexpr,
    EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """For tile t of the weight and run r of samples. If SUMS: sums[r, o, j] = sum_i g_i[o, j], the tile's share of
    |g_i|^2 in norms[i, t] and, if SQUARES, squares[r, o, j] = sum_i g_i[o, j]^2. If PROJECT: the tile's share of
    directions[k] . g_i in dots[i, k, t].

    ``directions`` is (K, O, J) float32. JOINT: a tile has any consecutive j; else channels of one kernel offset, so
    that whether a position lies in the image depends on the pixel alone. ROWS_JOIN: an image's pixels are at equal
    distances from one row to the next, and, for the input, the kernel is 1 x 1. EDGES: some tile has rows or columns
    beyond the weight.
    """
    tile = tl.program_id(0) % tiles
    run = tl.program_id(0) // tiles
    column_tile = tile % column_tiles
    out = tile // column_tiles % out_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    group = (tile // column_tiles // out_tiles).to(tl.int64)
    out_inside = out < out_channels
    if JOINT:
        column = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        offset = column // in_channels
        channel = column % in_channels
        column_inside = column < offsets * in_channels
    else:
        offset = column_tile % offsets
        channel = column_tile // offsets * BLOCK_J + tl.arange(0, BLOCK_J)
        column = offset * in_channels + channel
        column_inside = channel < in_channels
    shift_y = offset // kernel_width * dilation_y - padding_y
    shift_x = offset % kernel_width * dilation_x - padding_x
    rows = group * out_channels + out
    row_offsets = rows * grad_channel
    column_offsets = (group * in_channels + channel) * input_channel
    if not INPUT_ROWS_JOIN:  # where rows join, the shift is 0, and 16-byte loads need to know that
        column_offsets += shift_y.to(tl.int64) * input_y + shift_x.to(tl.int64) * input_x
    place = rows[:, None] * (offsets * in_channels) + column[None, :]
    valid = out_inside[:, None] & column_inside[None, :]

    first = (run * run_length).to(tl.int64)
    total = tl.zeros([BLOCK_O, BLOCK_J], tl.float32)
    total_squares = tl.zeros([BLOCK_O, BLOCK_J], tl.float32)
    for i in range(tl.minimum(run_length, samples - run * run_length)):
        sample = first + i
        a_image = input + sample * input_sample
        b_image = grad_output + sample * grad_sample
        gradient = tl.zeros([BLOCK_O, BLOCK_J], tl.float32)
        for begin in range(0, pixels, BLOCK_P):
            pixel = begin + tl.arange(0, BLOCK_P)
            pixel_inside = pixel < pixels
            y = pixel // out_width
            x = pixel % out_width
            if GRAD_ROWS_JOIN:
                b_pixels = pixel.to(tl.int64) * grad_x
            else:
                b_pixels = y.to(tl.int64) * grad_y + x.to(tl.int64) * grad_x
            if INPUT_ROWS_JOIN:
                a_pixels = pixel.to(tl.int64) * input_x
            else:
                a_pixels = (y * stride_y).to(tl.int64) * input_y + (x * stride_x).to(tl.int64) * input_x
            a_mask = pixel_inside[:, None] & column_inside[None, :]
            if PADDED:
                if JOINT:
                    in_y = (y * stride_y)[:, None] + shift_y[None, :]
                    in_x = (x * stride_x)[:, None] + shift_x[None, :]
                    a_mask = a_mask & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
                else:
                    in_y = y * stride_y + shift_y
                    in_x = x * stride_x + shift_x
                    a_mask = a_mask & ((in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width))[:, None]
            b_mask = out_inside[:, None] & pixel_inside[None, :]
            b = tl.load(b_image + row_offsets[:, None] + b_pixels[None, :], mask=b_mask, other=0.0)
            a = tl.load(a_image + column_offsets[None, :] + a_pixels[:, None], mask=a_mask, other=0.0)
            gradient = tl.dot(b, a, gradient, input_precision=PRECISION)
        if EDGES:  # 0 times an infinite operand
            gradient = tl.where(valid, gradient, 0.0)
        if SUMS:
            total += gradient
            square = gradient * gradient
            if SQUARES:
                total_squares += square
            tl.store(norms + sample * tiles + tile, tl.sum(tl.sum(square, axis=1), axis=0))
        if PROJECT:
            direction = directions
            for k in range(num_terms):
                u = tl.load(direction + place, mask=valid, other=0.0)
                direction += numel
                tl.store(dots + (sample * num_terms + k) * tiles + tile, tl.sum(tl.sum(gradient * u, axis=1), axis=0))
    if SUMS:
        tl.store(sums + run.to(tl.int64) * numel + place, total, mask=valid)
        if SQUARES:
            tl.store(squares + run.to(tl.int64) * numel + place, total_squares, mask=valid)


@triton.jit(do_not_specialize=["runs"])
def sum_kernel(
    sums: tl.tensor,
    runs: tl.tensor,
    numel: tl.tensor,
    in_channels: tl.tensor,
    offsets: tl.tensor,
    result: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """result[o, channel, offset] = sums[0, o, offset, channel] = sum over r of sums[r, o, offset, channel], added in
    float64."""
    row_length = offsets * in_channels
    blocks = tl.cdiv(row_length, BLOCK)
    start = (tl.program_id(0) // blocks).to(tl.int64) * row_length
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < row_length
    total = tl.zeros([BLOCK], tl.float64)
    piece = sums + start
    for _ in range(runs):
        total += tl.load(piece + column, mask=inside, other=0.0).to(tl.float64)
        piece += numel
    rounded = total.to(tl.float32)
    tl.store(sums + start + column, rounded, mask=inside)
    tl.store(result + start + column % in_channels * offsets + column // in_channels, rounded, mask=inside)
