"""From lists of tensors to the operands of kernels: what every operator does first."""

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..memory_order import in_order_of, is_row
from . import chunks, float64_arithmetic, tables
from .tables import View, check

_Result = TypeVar("_Result")


def on_device_of_first(operator: Callable[..., _Result]) -> Callable[..., _Result]:
    """Triton launches on the current device and its current stream."""

    @wraps(operator)
    def guarded(first: Sequence[Tensor], *arguments: Any) -> _Result:
        device = first[0].device if first else torch.device("cpu")
        with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
            return operator(first, *arguments)

    return guarded


class Flat:
    """A list of tensors as one flat vector, and the tables with which kernels run along it. A tensor that has an int8
    direction is read in row-major order."""

    def __init__(
        self, like: Sequence[Tensor], block: int | None = None, directions: Sequence[Tensor] = (), num_terms: int = 0
    ) -> None:
        check(len(like) > 0, "expected at least one tensor")
        self._like = like
        self._block = block or chunks.BLOCK
        self.lengths = tuple([tensor.numel() for tensor in like])
        self.chunks = -(-sum(self.lengths) // self._block)
        self._index = like[0].get_device()
        self._place = tables.Place.of(like[0])
        segments = tables.write_segments if self._place.capturing else tables.cached_segments
        self._begins, self._firsts = segments(self.lengths, self._block, self._place)
        self._directions, self._num_terms = directions, num_terms
        self._has_scales = num_terms > 0 and len(directions) == 2 * num_terms * len(like)
        self._int8 = set[int]()
        if self._has_scales:
            period = 2 * len(like)
            self._int8 = {i % period for i, tensor in enumerate(directions) if tensor.dtype == torch.int8}
        self._row_major = all(tensor.is_contiguous() or i in self._int8 for i, tensor in enumerate(like))
        self._copies: list[Sequence[Tensor]] = []

    def in_order(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors in the order in which this list is read, copied where they are not: one after another for each
        segment, or flat ones, of which rows are in order already."""
        segments, total = len(self.lengths), sum(self.lengths)
        if self._row_major or all(is_row(tensor) and tensor.numel() == total for tensor in tensors):
            return [tensor.contiguous() for tensor in tensors]
        if segments > 1 and all(tensor.numel() == total for tensor in tensors):
            tensors = [part for tensor in tensors for part in tensor.reshape(-1).split(self.lengths)]
        numels = [tensor.numel() for tensor in tensors]
        check(numels == list(self.lengths) * (len(tensors) // segments), f"expected {segments} tensors of these sizes")
        return [
            tensor.contiguous() if i % segments in self._int8 else in_order_of(tensor, self._like[i % segments])
            for i, tensor in enumerate(tensors)
        ]

    def view(self, tensors: Sequence[Tensor], num_terms: int = 1) -> View:
        """Tensors to read: for each term one flat tensor or row, or one tensor for each segment. Those that are in
        another order than this list are copied; the copies live as long as this object."""
        if not self._row_major or not all(tensor.is_contiguous() for tensor in tensors):
            tensors = self.in_order(tensors)
            self._copies.append(tensors)
        return self._written(tensors, num_terms, tables.write_view if self._place.capturing else tables.cached_view)

    def directions(self) -> View:
        """Those that this list was made with."""
        if not self._has_scales:
            return self.view(self._directions, self._num_terms)
        tensors, count = self._directions, len(self.lengths)
        if not self._row_major or not all(tensor.is_contiguous() for tensor in tensors):
            halves = [tensors[i : i + count] for i in range(0, len(tensors), count)]
            tensors = [
                tensor
                for i, half in enumerate(halves)
                for tensor in (self.in_order(half) if i % 2 == 0 else [scales.contiguous() for scales in half])
            ]
            self._copies.append(tensors)
        write = tables.write_int8_view if self._place.capturing else tables.cached_int8_view
        return self._written(tensors, self._num_terms, write)

    def _written(self, tensors: Sequence[Tensor], num_terms: int, write: Callable[..., View]) -> View:
        check(all(tensor.get_device() == self._index for tensor in tensors), "tensors are on different devices")
        return write(
            self.lengths,
            num_terms,
            self.lengths if tensors is self._like else tuple([tensor.numel() for tensor in tensors]),
            tuple([tensor.dtype for tensor in tensors]),
            tuple([tensor.data_ptr() for tensor in tensors]),
            self._place,
        )

    def numbers(self, tensor: Tensor, count: int) -> Tensor:
        """Coefficients: consecutive doubles on the device of the other operands."""
        check(tensor.numel() == count, f"expected {count} coefficients, got {tensor.numel()}")
        check(
            tensor.dtype == torch.float64 and tensor.get_device() == self._index,
            "coefficients are a float64 tensor on the device of the parameters",
        )
        return tensor.contiguous()

    def empty_float64(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._place.device)

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Runs a kernel with one program for each chunk."""
        if self.chunks == 0:
            return
        constants["PAIRS"] = chunks.pairs(constants, float64_arithmetic.slow_float64(self._place.device))
        if torch.version.hip is None:
            constants["maxnreg"] = chunks.registers(kernel.__name__, constants)
        kernel[(self.chunks,)](
            self._begins,
            self._firsts,
            sum(self.lengths),
            *arguments,
            **constants,
            BLOCK=self._block,
            num_warps=chunks.NUM_WARPS,
            enable_fp_fusion=not constants["PAIRS"],
        )


class Target:
    """Tensors to write, one for each segment. Those that are in another order than their segment are written through a
    copy: call ``write_back`` after the kernel."""

    def __init__(self, flat: Flat, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._ordered = flat.in_order(tensors)  # itself, where it is in order
        self.view = flat.view(self._ordered)

    def write_back(self) -> None:
        for tensor, ordered in zip(self._tensors, self._ordered, strict=True):
            if ordered is not tensor:
                tensor.copy_(ordered.reshape(tensor.shape))


def check_targets(targets: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    check(len(targets) == len(params), "expected one target for each parameter")
    check(
        all(target.dtype == parameter.dtype for target, parameter in zip(targets, params, strict=True)),
        "a target has another dtype than its parameter",
    )


def check_state(fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> None:
    check(len(fisher) == len(anchor), "fisher and anchor are lists of different lengths")
    for s, m in zip(fisher, anchor, strict=True):
        check(
            s.dtype == m.dtype and s.dtype in (torch.float32, torch.float64),
            "the diagonal Fisher and its anchor are both float32 or both float64",
        )
