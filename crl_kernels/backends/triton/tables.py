"""The addresses of a list of tensors as tables on the device, which kernels read. ``chunks.py`` defines their entries.

Tables are cached on their content (addresses, dtypes, lengths), so an unchanged list costs no copy and never waits for
the device. A table is a function of its key: an address that was freed and given to another tensor changes nothing.
The key has the stream as well, because a table is ready, and may be freed, in the order of the stream that wrote it.

CUDA graphs. Within a capture nothing is taken from the cache or put into it: tables are written by kernels that carry
the words as arguments, into memory of the graph's own pool. So a graph holds all that it needs, no eviction can take a
table away from it, and gradients that are created within the capture, at new addresses, are served too. This costs
some small kernels at every replay.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

TABLES = 128  # of entries, and as many of segments; a training step needs one for each list of tensors in it

# Codes and sizes.
DTYPES = {torch.float32: (0, 4), torch.float64: (1, 8), torch.bfloat16: (2, 2), torch.float16: (3, 2)}
INT8 = 4  # its code


def check(condition: bool, message: str) -> None:
    """Python checks the user's input and explains errors; the checks here only keep memory safe."""
    if not condition:
        raise RuntimeError(f"crl_kernels: {message}")


class Place(NamedTuple):
    """A device and, on a GPU, its current stream and whether that is being captured."""

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
    stride: int  # entries of a segment: 1, 3 of directions of which some are int8, or 0 for one of all segments
    pieces: int  # entries of one term
    dtypes: int  # those that occur, as bits of their codes

    @property
    def vector(self) -> tuple[Tensor, int]:
        """A kernel's operands for one vector."""
        return self.entries, self.stride

    @property
    def terms(self) -> tuple[Tensor, int, int]:
        """A kernel's operands for several."""
        return self.entries, self.stride, self.pieces


def write_segments(lengths: tuple[int, ...], block: int, place: Place) -> tuple[Tensor, Tensor]:
    """(where each segment begins in the flat vector, and its end; the segment in which each chunk begins, and the last
    segment)."""
    begins = place.upload([0, *accumulate(lengths)])
    chunks = -(-sum(lengths) // block)
    starts = torch.arange(chunks + 1, device=place.device) * block
    firsts = torch.searchsorted(begins, starts, right=True) - 1
    return begins, firsts.clamp(max=len(lengths) - 1).to(torch.int32)


def write_view(
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
        check(dtype in DTYPES, f"tensor {i} of a list is {dtype}, expected float32, float64, bfloat16 or float16")
        length = expected[i % pieces]
        check(numel == length, f"tensor {i} of a list has {numel} elements, expected {length}")
        code, size = DTYPES[dtype]
        entries.append(8 * (address - size * begins[i % pieces]) + code)
        present |= 1 << code
    return View(place.upload(entries), 0 if flat else 1, pieces, present)


def write_int8_view(
    lengths: tuple[int, ...],
    num_terms: int,
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    addresses: tuple[int, ...],
    place: Place,
) -> View:
    """The same for directions of which some are int8: term by term one tensor for each segment, then its scales."""
    count = len(lengths)
    begins = (0, *accumulate(lengths))
    words, present = [], 0
    for i in (2 * count * k + segment for k in range(num_terms) for segment in range(count)):
        segment, scales = i % (2 * count), i + count
        check(
            numels[i] == lengths[segment],
            f"tensor {segment} of a term has {numels[i]} elements, expected {lengths[segment]}",
        )
        int8 = dtypes[i] == torch.int8
        check(
            int8 or dtypes[i] in DTYPES, f"tensor {segment} of a term is {dtypes[i]}, expected int8 or floating point"
        )
        check(dtypes[scales] == torch.float32, f"scales of directions are {dtypes[scales]}, expected float32")
        divides = numels[scales] > 0 and numels[i] % numels[scales] == 0
        check(
            divides if int8 and numels[i] > 0 else numels[scales] == 0,
            f"tensor {segment} of a term has {numels[i]} elements and {numels[scales]} scales; expected a number of "
            "scales that divides int8 elements, and none beside others",
        )
        code, size = (INT8, 1) if int8 else DTYPES[dtypes[i]]
        length = numels[i] // numels[scales] if numels[scales] > 0 else 1
        words += [8 * (addresses[i] - size * begins[segment]) + code, addresses[scales], length]
        present |= 1 << code
    return View(place.upload(words), 3, 3 * count, present)


cached_segments = functools.lru_cache(maxsize=TABLES)(write_segments)
cached_view = functools.lru_cache(maxsize=TABLES)(write_view)
cached_int8_view = functools.lru_cache(maxsize=TABLES)(write_int8_view)
