"""What is taken of per-sample gradients while a backward pass makes them: statistics, or sums with weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..backends.reference import mean_dtype
from ..model.binding import Binding
from .layer_gradients import MatrixGradient, SampleGradient, Statistics, Wanted
from .operands import ParameterUse, contiguous_strides
from .sample_layout import SampleLayout

# Per-sample gradients of parameters with at most this many elements are kept until the end and processed together: for
# a bias or a norm's scale, the calls cost more than the arithmetic.
_SMALL = 4096


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one parameter's part of the per-sample gradients. The model's are the sums over its parameters."""

    sq_norms: Tensor  # (N,) float64
    projections: Tensor  # (N,), or (N, K) for K directions, float64
    gram: Tensor | None  # (N, N) float64


class WeightedSums:
    """sum_i w_ki g_i, summed up while a backward pass makes the g_i."""

    def __init__(self, weights: Tensor, binding: Binding) -> None:
        self.weights = weights  # (K, N)
        self.rows = weights.new_zeros(len(weights), binding.layout.numel, dtype=binding.dtype)
        self._rows_by_parameter = self.rows.split(binding.layout.lengths, 1)
        self.uses: dict[int, list[ParameterUse]] = {}  # by parameter

    def add(self, use: ParameterUse, gradient: SampleGradient) -> None:
        self.uses.setdefault(use.index, []).append(use)
        use.add_to(self._rows_by_parameter[use.index], gradient.weighted_sums(self.weights))


class GradientCollector:
    """Takes the per-sample gradients of one block, use by use.

    While ``weighted_sums`` is set, sums with its weights are taken, otherwise statistics. Statistics of a parameter
    that several calls use are taken at the end, of the sum of its per-sample gradients.
    """

    def __init__(
        self, binding: Binding, directions: Sequence[Tensor] | None, single_direction: bool, gram: bool, diagonal: bool
    ) -> None:
        self._binding, self._directions, self._single_direction = binding, directions, single_direction
        self._want_gram, self._want_diagonal = gram, diagonal
        self.weighted_sums: WeightedSums | None = None
        self.by_passes = False  # while gradients are taken from the losses, not from layers
        self._statistics: dict[int, list[Statistics]] = {}  # by parameter
        self._small: list[tuple[ParameterUse, Tensor]] = []
        self._shared: dict[int, Tensor] = {}  # (N, numel), of parameters that are used more than once
        self.sums: dict[int, Tensor] = {}  # float32 sums of 16-bit parameters' gradients, flat
        self.assumed_sums: dict[int, Tensor] = {}  # of what was taken in a pass that is not checked, flat

    def weights(self) -> Tensor | None:
        """(K, N) of the sums that are being taken; None while statistics are."""
        return None if self.weighted_sums is None else self.weighted_sums.weights

    def take(self, use: ParameterUse, gradient: SampleGradient, layout: SampleLayout) -> Tensor:
        """Takes what is wanted of a use's per-sample gradients and returns their sum."""
        if use.index in layout.by_passes and not self.by_passes:
            return gradient.matrix().sum(0)
        if self.weighted_sums is not None:
            self.weighted_sums.add(use, gradient)
            return self.weighted_sums.rows.new_zeros(()).expand(use.shape)  # thrown away
        if layout.assumed:
            total = gradient.matrix().sum(0)
            if use.index not in self.assumed_sums:
                self.assumed_sums[use.index] = total.new_zeros(self._binding.layout.lengths[use.index])
            use.add_to(self.assumed_sums[use.index][None], total[None])
        if use.index in layout.several or use.overlaps_itself():
            matrix = gradient.matrix()
            if use.index not in self._shared:
                self._shared[use.index] = matrix.new_zeros(len(matrix), self._binding.layout.lengths[use.index])
            use.add_to(self._shared[use.index], matrix)
            return matrix.sum(0)
        if isinstance(gradient, MatrixGradient) and use.shape.numel() <= _SMALL:
            matrix = gradient.matrix()
            self._small.append((use, matrix))
            return matrix.sum(0)
        statistics = gradient.statistics(self._wanted(use))
        self._keep_statistics(use, statistics)
        return statistics.sum

    def _wanted(self, use: ParameterUse) -> Wanted:
        u = None if self._directions is None else use.view(self._directions[use.index])
        return Wanted(u, self._want_gram, self._want_diagonal)

    def _keep_statistics(self, use: ParameterUse, statistics: Statistics) -> None:
        self._keep_sums(use, statistics.sum, statistics.squares)
        small = replace(statistics, sum=statistics.sum.new_empty(0), squares=None)
        self._statistics.setdefault(use.index, []).append(small)

    def _keep_sums(self, use: ParameterUse, total: Tensor, squares: Tensor | None) -> None:
        """Keeps a float32 sum where ``.grad`` has 16 bits, and the sum of squares."""
        if squares is not None:
            use.view(self.squares[use.index][None])[0].copy_(squares)
        parameter = self._binding.params[use.index]
        if parameter.dtype not in (torch.float32, torch.float64):
            if use.index not in self.sums:
                self.sums[use.index] = total.new_zeros(parameter.numel())
            use.view(self.sums[use.index][None])[0].copy_(total)

    @cached_property
    def squares(self) -> list[Tensor]:
        """sum_i g_ij^2, flat, for each parameter."""
        return [
            parameter.new_zeros(parameter.numel(), dtype=mean_dtype(parameter.dtype))
            for parameter in self._binding.params
        ]

    def finish(self, count: int, scale: float) -> LayerStatistics:
        """The model's statistics, after the block's pass over ``count`` samples.

        ``scale``: a sample's loss, as a multiple of what the pass adds up: 1 for a sum, N for a mean.
        """
        self._count, self._scale = count, scale
        for index, matrix in self._shared.items():
            shape = self._binding.layout.shapes[index]
            parameter = ParameterUse(index, shape, contiguous_strides(shape), 0)
            gradient = MatrixGradient(matrix.reshape(count, *shape))
            self._keep_statistics(parameter, gradient.statistics(self._wanted(parameter)))
        self._shared.clear()
        return self._total([part for parts in self._statistics.values() for part in parts] + self._take_small())

    def _take_small(self) -> list[Statistics]:
        """Statistics of all small gradients together: one set of calls instead of one for each parameter."""
        if not self._small:
            return []
        wanted = [self._wanted(use) for use, _ in self._small]
        u = [part.directions.reshape(len(part.directions), -1) for part in wanted if part.directions is not None]
        all_wanted = Wanted(torch.cat(u, 1) if u else None, self._want_gram, self._want_diagonal)
        lengths = [use.shape.numel() for use, _ in self._small]
        rows = torch.cat([matrix.reshape(len(matrix), -1) for _, matrix in self._small], 1)
        statistics = MatrixGradient(rows).statistics(all_wanted)
        squares = [None] * len(lengths) if statistics.squares is None else statistics.squares.split(lengths)
        for (use, _), total, part in zip(self._small, statistics.sum.split(lengths), squares, strict=True):
            self._keep_sums(use, total.reshape(use.shape), None if part is None else part.reshape(use.shape))
        return [statistics]

    def _total(self, parts: Sequence[Statistics]) -> LayerStatistics:
        count, scale = self._count, self._scale
        num_directions = 1 if self._directions is None else len(self._directions[0])
        zeros = torch.zeros(count, num_directions, dtype=torch.float64, device=self._binding.device)
        projection_scale = scale * scale / count if self._directions is None else scale
        projections = sum((part.projections for part in parts), zeros) * projection_scale
        gram = None
        if self._want_gram:
            grams = (part.gram for part in parts if part.gram is not None)
            gram = sum(grams, zeros.new_zeros(count, count)) * scale**2
        return LayerStatistics(
            sum((part.sq_norms for part in parts), zeros[:, 0]) * scale**2,
            projections[:, 0] if self._single_direction else projections,
            gram,
        )

    def per_layer(self) -> dict[str, LayerStatistics]:
        """By parameter name, after ``finish``."""
        parts = {index: list(statistics) for index, statistics in self._statistics.items()}
        for use, matrix in self._small:
            parts.setdefault(use.index, []).append(MatrixGradient(matrix).statistics(self._wanted(use)))
        return {name: self._total(parts.get(i, [])) for i, name in enumerate(self._binding.layout.names)}
