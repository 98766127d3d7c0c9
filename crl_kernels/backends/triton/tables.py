"""From lists of tensors to tables of addresses on the device: what every operator does first. See ``kernels.py``.

Tables are cached on their content (addresses, dtypes, lengths), so an unchanged list costs no copy and never waits for
the device. A table is a function of its key: an address that was freed and given to another tensor changes nothing.
The key has the stream as well, because a table is ready, and may be freed, in the order of the stream that made it.

CUDA graphs. Within a capture nothing is taken from the cache or put into it: tables are written by kernels that carry
the words as arguments, into memory of the graph's own pool. So a graph holds all that it needs, no eviction can take a
table away from it, and gradients that are created within the capture, at new addresses, are served too. This costs
some small kernels at every replay.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels

TABLES = 128  # of entries, and as many of segments; a training step needs one for each list of tensors in it

_DTYPES = {
    torch.float32: (0, 4),
    torch.float64: (1, 8),
    torch.bfloat16: (2, 2),
    torch.float16: (3, 2),
}  # codes and sizes


def check(condition: bool, message: str) -> None:
    """Python checks the user's input and says what is wrong with it; the checks here only keep memory safe."""
    if not condition:
        raise RuntimeError(f"crl_kernels: {message}")


class Place(NamedTuple):
    """Where tables are made: a device and, on a GPU, its current stream and whether that is being captured."""

    device: torch.device
    stream: int
    capturing: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Place":
        if tensor.device.type == "cpu":
            return cls(tensor.device, 0, False)
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        return cls(tensor.device, stream, torch.cuda.is_current_stream_capturing())

    def upload(self, words: Sequence[int]) -> Tensor:
        """The words as int64 on the device, without waiting for it."""
        if self.capturing:
            table = torch.zeros(len(words), dtype=torch.int64, device=self.device)
            torch._foreach_add_(table.unbind(), list(words))
            return table
        if self.device.type == "cpu":
            return torch.tensor(words, dtype=torch.int64)
        # torch keeps the pinned source until the copy is done.
        return torch.tensor(words, dtype=torch.int64).pin_memory().to(self.device, non_blocking=True)


class View(NamedTuple):
    """One or more flat vectors (terms) along the same segments, as kernels see them."""

    entries: Tensor
    stride: int  # 1: one entry for each segment; 0: one for all
    pieces: int  # entries of one term
    dtypes: int  # which are present, as bits


def _segments(lengths: tuple[int, ...], block: int, place: Place) -> tuple[Tensor, Tensor]:
    """(where each segment begins in the flat vector, and its end; the segment in which each chunk begins, and the last
    segment)."""
    begins = place.upload([0, *accumulate(lengths)])
    chunks = -(-sum(lengths) // block)
    starts = torch.arange(chunks + 1, device=place.device) * block
    firsts = torch.searchsorted(begins, starts, right=True) - 1
    return begins, firsts.clamp(max=len(lengths) - 1).to(torch.int32)


def _view(
    lengths: tuple[int, ...],
    num_terms: int,
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    addresses: tuple[int, ...],
    place: Place,
) -> View:
    count, pieces = len(numels), len(numels) // max(num_terms, 1)
    check(num_terms > 0 and count == num_terms * pieces, f"{count} direction tensors for {num_terms} terms")
    flat = pieces == 1 and numels[0] == sum(lengths)
    check(flat or pieces == len(lengths), f"expected one flat tensor or {len(lengths)} tensors, got {pieces}")
    expected = (numels[0],) if flat else lengths
    begins = (0, *accumulate(expected))
    entries, present = [], 0
    for i, (numel, dtype, address) in enumerate(zip(numels, dtypes, addresses, strict=True)):
        check(dtype in _DTYPES, f"tensor {i} of a list is {dtype}, expected float32, float64, bfloat16 or float16")
        want = expected[i % pieces]
        check(numel == want, f"tensor {i} of a list has {numel} elements, expected {want}")
        code, size = _DTYPES[dtype]
        entries.append(4 * (address - size * begins[i % pieces]) + code)
        present |= 1 << code
    return View(place.upload(entries), 0 if flat else 1, pieces, present)


_cached_segments = functools.lru_cache(maxsize=TABLES)(_segments)
_cached_view = functools.lru_cache(maxsize=TABLES)(_view)


class Flat:
    """A list of tensors as one flat vector, and what it takes to run kernels along it."""

    def __init__(self, like: Sequence[Tensor], block: int | None = None) -> None:
        check(len(like) > 0, "expected at least one tensor")
        self._like = like
        self._block = block or kernels.BLOCK
        self.lengths = tuple([tensor.numel() for tensor in like])
        self.chunks = -(-sum(self.lengths) // self._block)
        self._index = like[0].get_device()
        self._place = Place.of(like[0])
        segments = _segments if self._place.capturing else _cached_segments
        self._begins, self._firsts = segments(self.lengths, self._block, self._place)
        self._copies: list[Sequence[Tensor]] = []

    def view(self, tensors: Sequence[Tensor], num_terms: int = 1) -> View:
        """Tensors to read: for each term one flat tensor, or one tensor for each segment. Tensors that are not
        contiguous are copied; the copies live as long as this object."""
        if not all(tensor.is_contiguous() for tensor in tensors):
            tensors = [tensor.contiguous() for tensor in tensors]
            self._copies.append(tensors)
        check(all(tensor.get_device() == self._index for tensor in tensors), "tensors are on different devices")
        view = _view if self._place.capturing else _cached_view
        return view(
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
        if torch.version.hip is None:
            constants["maxnreg"] = kernels.registers(kernel.__name__, constants)
        kernel[(self.chunks,)](
            self._begins,
            self._firsts,
            sum(self.lengths),
            *arguments,
            **constants,
            BLOCK=self._block,
            num_warps=kernels.NUM_WARPS,
        )
