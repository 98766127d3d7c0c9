"""Which sample each row of a layer's output belongs to: backward passes measure it, nothing is guessed from shapes.

A row of an output y belongs to sample i if loss_i is the only loss that depends on it. Then the gradient b of y in a
backward pass from sum_i w_i loss_i is, on that row, w_i times what it is with all weights one. So the ratio of two
passes identifies the sample, wherever the model has put it: in any dimension, several rows per sample, sorted, packed,
routed.

The weights are powers of two. Multiplying a floating-point number by a power of two does not round, so the ratios are
exact in every dtype. In pass k, sample i has the weight 2^digit_k(i), with the digits of a number that only this sample
has. In a last pass its weight is a random power of two: that detects rows that several samples share and whose ratios
are powers of two by chance.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 8  # powers of two in a pass; the largest must not make 16-bit gradients overflow
_EXACT = 1e-13  # fingerprints are added in float64


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor are the slices along ``dims``, in row-major order; row r belongs to sample samples[r]."""

    dims: tuple[int, ...]  # ascending
    samples: Tensor  # (rows,) int64
    count: int  # N
    in_order: bool  # row i is sample i
    lasting: bool = True  # known for every row, so it also holds for other values in the same places

    @classmethod
    def batch_first(cls, count: int, device: torch.device) -> "Rows":
        return cls((0,), torch.arange(count, device=device), count, True)

    def first(self, tensor: Tensor) -> Tensor:
        """(rows, *other dimensions)"""
        if not self.dims:
            return tensor[None]
        moved = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        return moved if len(self.dims) == 1 else moved.flatten(0, len(self.dims) - 1)

    def sum(self, rows: Tensor) -> Tensor:
        """(rows, *shape) -> (N, *shape): the sum of each sample's rows."""
        if self.in_order:
            return rows
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self.samples, rows)

    def tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(..., C), with ``dims`` among the leading ones -> (N, T, C): each sample's rows one after another as tokens,
        padded with zeros to the largest number of tokens."""
        rows = [self.first(tensor) for tensor in tensors]
        rows = [part.flatten(1, -2) if part.dim() > 2 else part[:, None] for part in rows]
        if self.in_order:
            return tuple(rows)
        order = self.samples.argsort(stable=True)
        sizes = self.samples.bincount(minlength=self.count)
        most = max(1, int(sizes.max()))
        if bool((sizes == most).all()):
            return tuple(part[order].reshape(self.count, most * part.shape[1], part.shape[2]) for part in rows)
        sample_of_row = self.samples[order]
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[sample_of_row]
        padded = []
        for part in rows:
            full = part.new_zeros(self.count, most, *part.shape[1:])
            full[sample_of_row, place] = part[order]
            padded.append(full.flatten(1, 2))
        return tuple(padded)

    def weigh(self, tensor: Tensor, weights: Tensor) -> Tensor:
        """``tensor`` with each row multiplied by its sample's weight."""
        shape = [size if dim in self.dims else 1 for dim, size in enumerate(tensor.shape)]
        return tensor * weights[self.samples].reshape(shape).to(tensor.dtype)


class Codes:
    """Weights of the losses in the passes that tell N samples apart."""

    def __init__(self, count: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(count)
        self.count, self._device = count, device
        self._number = torch.randperm(count, generator=generator)  # of each sample
        self._sample = self._number.argsort()
        digits = max(1, math.ceil(math.log(count, _LEVELS) - 1e-9)) if count > 1 else 0
        self._places = [_LEVELS**k for k in range(digits)]
        self.last = 2.0 ** torch.randint(_LEVELS, (count,), generator=generator)
        passes = [torch.ones(count, dtype=torch.float64)]
        passes += [2.0 ** (self._number // place % _LEVELS) for place in self._places]
        self.passes = [weights.to(device, torch.float64) for weights in (*passes, self.last)]

    def rows(self, prints: Sequence[Tensor], dims: tuple[int, ...], noise: float = 0.0) -> Rows | None:
        """The rows of a tensor whose :func:`fingerprint` along ``dims`` was ``prints`` in the passes; None if samples
        share rows for every choice among ``dims``. ``noise``: how far fingerprints of equal passes are apart,
        relatively."""
        for chosen in _choices(len(dims)):
            *coded, last = (_along(chosen, each) for each in prints)
            samples = self._decode(coded, noise)
            if samples is not None and _agree(last, coded[0] * self.last[samples], noise, samples >= 0):
                samples, in_order, lasting = self._completed(samples)
                chosen_dims = tuple(dims[i] for i in chosen)
                return Rows(chosen_dims, samples.to(self._device), self.count, in_order, lasting)
        return None

    def confirm(self, rows: Rows, prints: Sequence[Tensor], dims: tuple[int, ...], noise: float = 0.0) -> bool:
        """Whether ``rows`` also holds for the tensor with these fingerprints, from all passes but the last."""
        chosen = tuple(i for i, dim in enumerate(dims) if dim in rows.dims)
        samples = self._decode([_along(chosen, each) for each in prints], noise)
        if samples is None or samples.shape != rows.samples.shape:
            return False
        return torch.equal(samples[samples >= 0], rows.samples.cpu()[samples >= 0])

    def _decode(self, prints: Sequence[Tensor], noise: float) -> Tensor | None:
        """The sample of each row, -1 where no gradient arrives."""
        ones, *coded = prints
        arrives = ones > 0
        if not all(bool(torch.isfinite(each).all()) and bool((each[arrives] > 0).all()) for each in prints):
            return None
        number = torch.zeros(ones.shape, dtype=torch.int64)
        for place, weighted in zip(self._places, coded, strict=True):
            digit = (weighted / ones).log2().round().where(arrives, 0)
            if not _agree(weighted, ones * 2**digit, noise, arrives):
                return None
            number += place * digit.long()
        if bool(((number < 0) | (number >= self.count)).any()):
            return None
        return self._sample[number].where(arrives, -1)

    def _completed(self, samples: Tensor) -> tuple[Tensor, bool, bool]:
        """(samples without -1, whether row i is sample i, whether that also holds for other gradients, for which every
        sample must have been seen). A row that no gradient reaches adds nothing, so it may be given to any sample."""
        known, count, rows = samples >= 0, self.count, len(samples)
        regular = []
        if rows and rows % count == 0:
            row = torch.arange(rows)
            regular = [row % count, row // (rows // count)][: 1 if rows == count else 2]
        fitting = [pattern for pattern in regular if torch.equal(pattern[known], samples[known])]
        seen = len(samples[known].unique()) == count
        if fitting:
            return fitting[0], rows == count, seen and (bool(known.all()) or len(fitting) == 1)
        return samples.clamp(min=0), False, seen and bool(known.all())


def _choices(dims: int) -> list[tuple[int, ...]]:
    """Sets of dimensions that may tell samples apart, smallest sets first, then leftmost."""
    sizes = range(1, dims + 1) if dims else (0,)
    return [chosen for size in sizes for chosen in itertools.combinations(range(dims), size)]


def _along(chosen: tuple[int, ...], prints: Tensor) -> Tensor:
    """Fingerprints along some of their dimensions, as a vector."""
    others = tuple(dim for dim in range(prints.dim()) if dim not in chosen)
    return (prints.sum(others) if others else prints).reshape(-1)


def _agree(prints: Tensor, expected: Tensor, noise: float, where: Tensor) -> bool:
    return bool(((prints - expected).abs() <= (noise + _EXACT) * expected)[where].all())


def fingerprint(gradient: Tensor, dims: Sequence[int]) -> Tensor:
    """sum |b| over all dimensions but ``dims``, float64, on the CPU. A row multiplied by w has w times the sum."""
    magnitude = gradient.detach().abs()
    if magnitude.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()
    others = [dim for dim in range(gradient.dim()) if dim not in dims]
    return (magnitude.sum(others) if others else magnitude).cpu().double()
