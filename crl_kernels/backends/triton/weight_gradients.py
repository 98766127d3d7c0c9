"""Per-sample weight gradients of convolutions, and of linear layers as convolutions, in Triton. ``reference.py``
defines the operator. Grids depend on shapes alone, so results do not depend on the GPU's size. Nothing here has run on
a GPU yet: tile sizes follow from arithmetic and from compilers' reports."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import reference
from ..reference import Convolution, takes
from . import weight_gradients_kernels
from .reductions import finish
from .tables import check

# Registers of a program's 128 threads, for a tile of 64 by 128: 64 each for a sample's gradient, 64 for the sum, and
# some 100 for addresses. Two such programs share an H100's multiprocessor, so that one multiplies while the other one
# reduces. A tile takes 43 flops for each byte of 16-bit operands; one of 128 by 128 takes 64, but sits there alone.
OUT_CHANNELS = 64
COLUMNS = 128
NUM_WARPS = 4
# Two for each of an H100's 132 multiprocessors: where the weight has fewer tiles, samples are divided into runs. It
# bounds the memory of partial sums too: at most so many tiles beside the weight itself.
PROGRAMS = 264
JOINT_CHANNELS = 32  # fewer than this, and a tile takes several kernel offsets
SUM_COLUMNS = 1024

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compiler_fails(version: str, capability: tuple[int, int]) -> bool:
    """Whether this version of Triton ends the process when it compiles the kernels for a B200, as 3.6 does; 3.8 does
    not."""
    return capability[0] == 10 and tuple(map(int, version.split(".")[:2])) < (3, 8)


@cache
def _can_compile(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return not (nvidia and compiler_fails(triton.__version__, torch.cuda.get_device_capability(device)))


class Geometry(NamedTuple):
    """Sizes of a convolution; channels are those of one group."""

    samples: int
    groups: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.out_height * self.out_width

    @property
    def offsets(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def numel(self) -> int:
        return self.groups * self.out_channels * self.in_channels * self.offsets


def _pair(values: Sequence[int]) -> tuple[int, int]:
    check(len(values) == 2, "expected kernel_size, stride, padding and dilation as pairs")
    return values[0], values[1]


def _geometry(convolution: Convolution) -> Geometry:
    input, grad_output, *pairs, groups = convolution
    check(
        input.dim() == 4 and grad_output.dim() == 4 and input.shape[0] == grad_output.shape[0],
        "expected an input and a grad_output of shape (N, channels, height, width)",
    )
    check(
        input.dtype == grad_output.dtype and input.device == grad_output.device,
        "input and grad_output have one dtype and one device",
    )
    check(
        groups > 0 and input.shape[1] % groups == 0 and grad_output.shape[1] % groups == 0,
        "channels are no multiple of groups",
    )
    samples, in_channels, height, width = input.shape
    _, out_channels, out_height, out_width = grad_output.shape
    g = Geometry(
        samples,
        groups,
        in_channels // groups,
        out_channels // groups,
        height,
        width,
        out_height,
        out_width,
        *(_pair(values) for values in pairs),
    )
    for size, out, k, s, p, d in zip(
        (height, width), (out_height, out_width), g.kernel, g.stride, g.padding, g.dilation, strict=True
    ):
        check(
            k > 0 and s > 0 and p >= 0 and d > 0,
            "expected kernel_size, stride and dilation above 0, and padding from 0",
        )
        check(
            out == max(0, (size + 2 * p - (k - 1) * d - 1) // s + 1),
            "grad_output has images of another size than this convolution gives",
        )
    return g


def _block(size: int, largest: int) -> int:
    """The largest tile side that pads ``size`` by at most a quarter more than the best one does."""
    sides = [side for side in (128, 64, 32) if side <= largest]
    if size <= 16 or not sides:
        return 16
    padded = {side: -(-size // side) * side for side in sides}
    return next(side for side in sides if 4 * padded[side] <= 5 * min(padded.values()))


def tile_constants(g: Geometry, dtype: torch.dtype, more_tiles: bool, hip: bool) -> dict[str, int | bool | str]:
    """Tiles and precision of ``weight_gradient_kernel``.

    float32 on NVIDIA takes three products of tensor cores with TF32 operands (error about 2^-21 of a product), on AMD
    the matrix cores' own float32. Where registers also hold float32's parts, or ``more_tiles`` beside a sample's
    gradient and the sum (sums of squares, directions), a tile has half the columns, or an H100's would spill.
    """
    float32 = dtype == torch.float32
    joint = g.offsets > 1 and g.in_channels < JOINT_CHANNELS
    columns = g.offsets * g.in_channels if joint else g.in_channels
    block_o = _block(g.out_channels, OUT_CHANNELS)
    block_j = _block(columns, COLUMNS // 2 if float32 or more_tiles else COLUMNS)
    most_pixels = 32 if float32 or joint else 64
    pixels = 1 << max(0, g.pixels - 1).bit_length()
    return {
        "JOINT": joint,
        "PADDED": g.padding != (0, 0),
        "EDGES": g.out_channels % block_o != 0 or columns % block_j != 0,
        "PRECISION": "tf32x3" if float32 and not hip else "ieee",
        "BLOCK_O": block_o,
        "BLOCK_J": block_j,
        "BLOCK_P": min(most_pixels, max(16, pixels)),
    }


def launch_options(hip: bool) -> dict[str, int]:
    """Three blocks of pixels are under way where shared memory holds them: 72 KiB at most. gfx942 has 64."""
    return {"num_warps": NUM_WARPS, "num_stages": 2 if hip else 3}


def _rows_join(tensor: Tensor) -> bool:
    """Whether the distance of pixels within an image row, stride(3), is also that from one row's last to the next."""
    _, _, height, width = tensor.shape
    return height == 1 or tensor.stride(2) == width * tensor.stride(3)


def _with_adjacent_channels(input: Tensor, g: Geometry) -> Tensor:
    """A copy with adjacent channels, where they make 16-byte loads at each kernel offset: a row of pixels that is
    shifted by an offset is not aligned. The copy reads once what the kernel reads for each kernel offset and tile of
    output channels."""
    if g.offsets == 1 or g.in_channels * input.element_size() % 16 != 0 or input.stride(1) == 1:
        return input
    return input.contiguous(memory_format=torch.channels_last)


class _Sweep:
    """The launches of ``weight_gradient_kernel`` over one convolution."""

    def __init__(self, input: Tensor, grad_output: Tensor, g: Geometry, squares: bool, project: bool) -> None:
        hip = torch.version.hip is not None
        self._input, self._grad_output, self._geometry = _with_adjacent_channels(input, g), grad_output, g
        self._squares = squares
        self._constants = tile_constants(g, input.dtype, squares or project, hip)
        self._options = launch_options(hip)
        block_o, block_j = int(self._constants["BLOCK_O"]), int(self._constants["BLOCK_J"])
        self._out_tiles = -(-g.out_channels // block_o)
        columns = g.offsets * g.in_channels if self._constants["JOINT"] else g.in_channels
        self._column_tiles = -(-columns // block_j) * (1 if self._constants["JOINT"] else g.offsets)
        self.tiles = g.groups * self._out_tiles * self._column_tiles
        runs = max(1, min(g.samples, -(-PROGRAMS // max(1, self.tiles))))
        self._run_length = max(1, -(-g.samples // runs))
        self.runs = -(-g.samples // self._run_length)
        rows_join = _rows_join(grad_output)
        pixelwise = g.offsets == 1 and g.stride == (1, 1) and g.padding == (0, 0)
        self._constants["GRAD_ROWS_JOIN"] = rows_join
        self._constants["INPUT_ROWS_JOIN"] = (
            pixelwise and (g.height, g.width) == (g.out_height, g.out_width) and _rows_join(self._input)
        )

    def run(self, directions: Tensor | None, sums: Tensor | None, squares: Tensor, norms: Tensor, dots: Tensor) -> None:
        """directions: (K, O, J) float32; dots: (N, K, tiles). Without sums, sums and norms are not written."""
        g = self._geometry
        if self.tiles * self.runs == 0:
            return
        constants = self._constants
        if sums is None:  # with 64 pixels, addresses and a direction's 64 registers beside a gradient's would spill
            constants = constants | {"BLOCK_P": min(32, int(constants["BLOCK_P"]))}
        weight_gradients_kernels.weight_gradient_kernel[(self.tiles * self.runs,)](
            self._input,
            self._grad_output,
            *(self._input.stride(d) for d in range(4)),
            *(self._grad_output.stride(d) for d in range(4)),
            g.samples,
            self._run_length,
            g.in_channels,
            g.out_channels,
            g.height,
            g.width,
            g.out_width,
            g.pixels,
            g.kernel[1],
            g.offsets,
            *g.stride,
            *g.padding,
            *g.dilation,
            self._out_tiles,
            self._column_tiles,
            self.tiles,
            g.numel,
            norms if directions is None else directions,
            0 if directions is None else directions.shape[0],
            norms if sums is None else sums,
            squares,
            norms,
            dots,
            SUMS=sums is not None,
            SQUARES=self._squares and sums is not None,
            PROJECT=directions is not None,
            **constants,
            **self._options,
        )


def _sum_runs(sums: Tensor, runs: int, g: Geometry) -> Tensor:
    """The sum of (runs, O, J), in the weight's order; in j's order it is left in sums[0]."""
    result = sums.new_empty(g.groups * g.out_channels, g.in_channels, *g.kernel)
    if g.numel > 0:
        blocks = -(-g.in_channels * g.offsets // SUM_COLUMNS)
        weight_gradients_kernels.sum_kernel[(g.groups * g.out_channels * blocks,)](
            sums, runs, g.numel, g.in_channels, g.offsets, result, BLOCK=SUM_COLUMNS, num_warps=4
        )
    return result


@takes(Convolution)
def sample_weight_gradients(
    convolution: Convolution, directions: Tensor | None, gram: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """float64 operands, the Gram matrix, and all where the compiler fails, go to the reference, which has the matrix of
    all g_i in memory.

    A sample's gradient and sums over a run of samples are added in float32, the rest in float64; squares are float32,
    so a norm beyond its range becomes infinite and one below it 0.

    Without directions, each g_i is computed twice: its projection on the sum of all needs the whole sum. That takes as
    many multiplications as <b_i, conv2d(a_i, sum)>, on the same tensor cores, and rounds nothing to 16 bits: conv2d
    would need the sum in the operands' dtype, or the operands in float32, a tenth as fast.
    """
    input, grad_output = convolution[:2]
    g = _geometry(convolution)
    if gram or input.dtype == torch.float64 or not _can_compile(input.device):
        return reference.sample_weight_gradients(*convolution, directions, gram, squares)
    check(input.dtype in _DTYPES, "expected float32, float64, bfloat16 or float16 tensors")
    check(g.pixels < 2**30 and g.height * g.width < 2**30, "expected images of less than 2^30 pixels")
    check(g.in_channels * g.offsets < 2**30, "expected less than 2^30 weights for an output channel")
    if directions is not None:
        check(
            directions.dim() == 5
            and directions.shape[1:] == convolution.weight_shape
            and directions.device == input.device,
            "directions have the shape (K, O, C, kernel height, kernel width), on the device of the input",
        )
        directions = directions.float().flatten(3).transpose(2, 3).contiguous()
    with torch.cuda.device_of(input):
        sweep = _Sweep(input, grad_output, g, squares, directions is not None)
        num_terms = 1 if directions is None else directions.shape[0]
        sums, sums_of_squares = (
            input.new_empty(max(1, sweep.runs) * needed, g.numel, dtype=torch.float32) for needed in (True, squares)
        )
        norms = input.new_empty(g.samples, sweep.tiles, dtype=torch.float32)
        dots = input.new_empty(g.samples, num_terms, sweep.tiles, dtype=torch.float32)
        sweep.run(directions, sums, sums_of_squares, norms, dots)
        total = _sum_runs(sums, sweep.runs, g)
        if directions is None and sweep.runs > 0:
            sweep.run(sums[:1], None, sums_of_squares, norms, dots)
        sq_norms = input.new_empty(g.samples, dtype=torch.float64)
        projections = input.new_empty(g.samples, num_terms, dtype=torch.float64)
        finish(norms, sq_norms)
        finish(dots, projections)
        return (
            total,
            sq_norms,
            projections,
            input.new_empty(0, 0, dtype=torch.float64),
            _sum_runs(sums_of_squares, sweep.runs, g) if squares else total.new_empty(0),
        )
