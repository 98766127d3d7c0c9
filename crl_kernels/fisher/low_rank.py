"""Low-rank estimates: directions from the first half of the data, curvatures from the second."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.processes import Processes
from ..model.binding import Binding
from .forms import LowRankFisher
from .loss_source import LossSource, current_parameters, require_finite_losses
from .statistics import MeanProjections, curvature_of, statistics_of

_OVERSAMPLING = 8  # rows of a sketch beyond the rank


class _Stratum:
    """What the first look at one stratum's gradients leaves: sums of two parts of them, a sketch, then directions."""

    def __init__(self, binding: Binding) -> None:
        self.sums = torch.zeros(2, binding.layout.numel, dtype=torch.float64, device=binding.device)
        self.counts = [0, 0]
        self.sketch = torch.zeros(0, binding.layout.numel, dtype=binding.dtype, device=binding.device)
        self.directions = self.sketch  # (rank, P) in the storage dtype, after the first look

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.sums.sum(0) / self.count
        return mean

    def parts(self, members: Tensor) -> list[tuple[int, Tensor]]:
        """Which of a batch's samples go to which part. Only the first ones are cut in two."""
        if not self.count and len(members) > 1:
            return list(enumerate(members.tensor_split(2)))
        return [(int(self.counts[1] < self.counts[0]), members)]

    def merge(self, rows: Tensor, count: int) -> None:
        self.sketch = _top_rows(torch.cat([self.sketch, rows]), count)


# A sum of a batch's gradients: whose it is, of which part of its samples, None for a row of its sketch; weights, (N,).
_Sum = tuple[_Stratum, int | None, Tensor]


def _top_rows(matrix: Tensor, count: int) -> Tensor:
    """``count`` orthogonal rows R for which R^T R is the best approximation of matrix^T matrix, largest first.

    From the small Gram matrix: eigenvectors of G = M M^T give R = V^T M.
    """
    weights = _top_eigenvectors((matrix @ matrix.T).double(), count)
    rows: Tensor = weights.to(matrix.dtype) @ matrix
    return rows


def _top_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """(at most count, N): the eigenvectors of the largest eigenvalues, as rows."""
    _, eigenvectors = torch.linalg.eigh(gram)  # ascending
    top: Tensor = eigenvectors.flip(1)[:, :count].T
    return top


@dataclass(frozen=True)
class _Samples:
    """What the second look keeps of each sample, in float64 on the CPU: a few numbers."""

    stratum: Tensor  # (N,) int64
    sq_norms: Tensor  # (N,)
    projections: Tensor  # (N, rank) on its own stratum's directions; 0 for a stratum that has none
    on_mean: Tensor  # (N, 2) on its own stratum's mean, and on the mean of the first part
    on_whole: Tensor  # (N, 2) the same for the mean over all strata


class LowRankEstimate:
    """Two looks at the data: one that finds directions, and one along them."""

    def __init__(
        self, source: LossSource, processes: Processes, rank: int, direction: str, storage_dtype: torch.dtype
    ) -> None:
        self._source, self._processes, self._rank, self._dtype = source, processes, rank, storage_dtype
        self._top, self._rows_kept = direction == "top", rank + _OVERSAMPLING
        self._strata: dict[int, _Stratum] = {}

    @property
    def count(self) -> int:
        """Samples of the first look."""
        return sum(found.count for found in self._strata.values())

    def find_directions(self, batches: Iterable[Any]) -> Tensor:
        """The first look. Returns the losses, (N,)."""
        seen = []
        for batch in self._source.checked(batches):
            losses, plan, sums = self._sums_of(batch)
            seen.append(losses.detach().double())
            rows: dict[_Stratum, list[int]] = {}
            for i, (found, part, _) in enumerate(plan):
                if part is None:
                    rows.setdefault(found, []).append(i)
                else:
                    found.sums[part] += sums[i]
            for found, its in rows.items():
                found.merge(sums[its], self._rows_kept)
            del losses, sums  # before the next batch's are made
        self._exchange()
        for key, found in self._strata.items():
            require_finite_losses(found.sums)
            found.directions = self._directions_of(found, f" of stratum {key}" if self._source.stratified else "")
        return torch.cat(seen)

    def _sums_of(self, batch: Any) -> tuple[Tensor, list[_Sum], Tensor]:
        """A batch's losses, (N,), the sums of its gradients that are wanted, and those sums, (len, P)."""
        source = self._source
        if not self._top and source.stratified is False and self._strata:  # one sum, that of all samples
            losses, stratum = source.losses(batch)
            return losses, self._plan(stratum), source.sum_of_gradients(losses)[None]
        with source.sample_gradients(gram=self._top) as sg:
            losses, stratum = source.losses(batch)
            if not self._top:
                plan = self._plan(stratum)
                return losses, plan, sg.weighted_rows(losses, _weights(plan))
            sg.backward(losses, retain_graph=True)
        source.forget_gradients()
        assert sg.gram is not None
        plan = self._plan(stratum, require_finite_losses(sg.gram))
        return losses, plan, sg.weighted_rows(losses, _weights(plan))

    def _plan(self, stratum: Tensor, gram: Tensor | None = None) -> list[_Sum]:
        """Which sums of a batch's gradients are wanted: parts of each stratum's sum, and with ``gram`` its top rows."""
        plan: list[_Sum] = []
        for key in stratum.unique().tolist():
            if key not in self._strata:
                self._strata[key] = _Stratum(self._source.binding)
            found = self._strata[key]
            members = (stratum == key).nonzero().flatten()
            for part, samples in found.parts(members):
                plan.append((found, part, _spread(samples, torch.ones_like(samples), stratum)))
                found.counts[part] += len(samples)
            if gram is not None:
                for weights in _top_eigenvectors(gram[members][:, members], self._rows_kept):
                    plan.append((found, None, _spread(members, weights, stratum)))
        return plan

    def _exchange(self) -> None:
        """The strata of all processes, each the same in all of them."""
        if not self.count:
            raise ValueError("loader yields no samples.")
        everyone = self._processes.gather({key: (s.counts, len(s.sketch)) for key, s in self._strata.items()})
        mine, self._strata = self._strata, {}
        for key in sorted({key for theirs in everyone for key in theirs}):
            found = self._strata[key] = mine.get(key) or _Stratum(self._source.binding)
            if len(everyone) == 1:
                continue
            self._processes.sum_(found.sums)
            found.counts = [sum(theirs[key][0][part] for theirs in everyone if key in theirs) for part in (0, 1)]
            sketch, found.sketch = found.sketch, found.sketch[:0]
            for process, theirs in enumerate(everyone):
                if rows := theirs[key][1] if key in theirs else 0:
                    theirs_sketch = (
                        sketch if process == self._processes.rank else sketch.new_empty(rows, sketch.shape[1])
                    )
                    found.merge(self._processes.broadcast_(theirs_sketch, process), self._rows_kept)

    def _directions_of(self, found: _Stratum, where: str) -> Tensor:
        """(rank, P), in the storage dtype."""
        if self._rank > found.count:
            raise ValueError(
                f"rank is {self._rank}, but the first half of the data{where} has only {found.count} samples; give "
                "more."
            )
        rows = _top_rows(found.sketch, self._rank) if self._top else found.mean[None]
        norms = rows.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            what = f"the gradients{where} span fewer than {self._rank} directions and the next"
            what = what if self._top else f"the mean gradient{where}"
            raise ValueError(
                f"{what} over the first half of the data is zero, so rank {self._rank} has no direction. Use "
                "kind='diagonal', and check that the loss depends on the parameters."
            )
        directions: Tensor = (rows / norms).to(self._dtype)
        return directions

    def look_along_them(self, batches: Iterable[Any]) -> tuple[_Samples, Tensor]:
        """The second look: square norms and projections on directions and means, of every sample of all processes; and
        this process's losses, (N,)."""
        binding, keys = self._source.binding, torch.tensor(list(self._strata), device=self._source.binding.device)
        kept = list(self._strata.values())
        blocks = [self._rows_of(found) for found in kept]
        direction = binding.layout.split(torch.cat(blocks))
        width, rank = len(blocks[0]), self._rank
        first_count = sum(found.counts[0] for found in kept)
        shares = [(found.count / self.count, found.counts[0] / max(first_count, 1)) for found in kept]
        weights = torch.tensor(shares, dtype=torch.float64, device=binding.device)
        # With "mean", the projection on the mean is that on the direction, up to the rounding of what is stored.
        norms = [1.0 if self._top else float(found.mean.norm()) for found in kept]
        mean_norms = torch.tensor(norms, dtype=torch.float64, device=binding.device)
        seen, seen_losses = [], []
        for batch in self._source.checked(batches):
            with self._source.sample_gradients(direction=direction) as sg:
                losses, stratum = self._source.losses(batch)
                sg.backward(losses)
            self._source.forget_gradients()
            projections = sg.projections.double().reshape(len(losses), len(kept), width)
            on_means = projections[..., -1 if self._top else 0] * mean_norms
            pairs = torch.stack([on_means, projections[..., rank]], dim=-1)
            own = (stratum[:, None] == keys)[..., None]  # one True, or none for a stratum that the first look lacked
            columns = [torch.stack([stratum.double(), require_finite_losses(sg.sq_norms).double()], dim=1)]
            columns += [(projections[..., :rank] * own).sum(1), (pairs * own).sum(1), (pairs * weights).sum(1)]
            seen.append(torch.cat(columns, dim=1).detach())
            seen_losses.append(losses.detach().double())
        if not seen:
            raise ValueError(
                f"loader ended after {self.count} samples, before the second half began. Give max_samples= the number "
                "of samples that it yields."
            )
        table = torch.cat(self._processes.gather(torch.cat(seen).cpu()))
        stratum, sq_norms, projections, on_mean, on_whole = table.split([1, 1, rank, 2, 2], dim=1)
        samples = _Samples(stratum[:, 0].long(), sq_norms[:, 0], projections, on_mean, on_whole)
        return samples, torch.cat(seen_losses)

    def _rows_of(self, found: _Stratum) -> Tensor:
        """What samples are projected on: the stored directions, the mean of the first part and, for "top", of all."""
        rows = [found.directions, (found.sums[0] / max(found.counts[0], 1))[None]]
        if self._top:
            rows.append(found.mean[None])
        return torch.cat([row.to(self._source.binding.dtype) for row in rows])

    def fisher(self, samples: _Samples, *, held_out: bool) -> LowRankFisher:
        total = len(samples.sq_norms)
        squares = samples.projections.square()
        directions, curvatures, errors, slopes, strata = [], [], [], [], []
        lost = dict.fromkeys(set(samples.stratum.tolist()) - set(self._strata), "second")
        for key, found in self._strata.items():
            members = samples.stratum == key
            if not (count := int(members.sum())):
                lost[key] = "first"
                continue
            # Over all samples, the curvature is p_s a_s, and its error that of both.
            curvature, error = curvature_of(squares[members], total)
            directions.append(found.directions)
            curvatures.append(curvature)
            errors.append(error)
            slopes.append(samples.projections[members].sum(0) / total)
            if self._source.stratified:
                means = MeanProjections(
                    samples.on_mean[members, 0], samples.on_mean[members, 1], found.count, found.counts[0]
                )
                strata.append(
                    statistics_of(
                        samples.sq_norms[members],
                        squares[members].sum(1),
                        means,
                        held_out=held_out,
                        curvature_se=_errors(curvature_of(squares[members], count)[1], held_out),
                        stratum=key,
                        share=count / total,
                    )
                )
        if lost:
            warnings.warn(
                "each stratum needs samples in both halves of the data, and is left out of the Fisher otherwise: "
                + ", ".join(f"{key} is only in the {half} half" for key, half in sorted(lost.items()))
                + ". Give more samples, or fewer strata.",
                stacklevel=3,
            )
        if not directions:
            raise ValueError("per_sample_loss: no stratum has samples in both halves of the data; shuffle the loader.")
        first = sum(found.counts[0] for found in self._strata.values())
        statistics = statistics_of(
            samples.sq_norms,
            squares.sum(1),
            MeanProjections(samples.on_whole[:, 0], samples.on_whole[:, 1], self.count, first),
            held_out=held_out,
            curvature_se=_errors(torch.cat(errors), held_out),
            strata=tuple(strata),
        )
        binding = self._source.binding
        return LowRankFisher(
            binding.layout.split(torch.cat(directions)),
            torch.cat(curvatures),
            current_parameters(binding),
            slopes=torch.cat(slopes),
            storage_dtype=self._dtype,
            statistics=statistics,
        )


def _weights(plan: Sequence[_Sum]) -> Tensor:
    return torch.stack([weights for _, _, weights in plan])


def _spread(samples: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """(N,) weights in float64: those given at ``samples``, zero elsewhere."""
    return torch.zeros(like.shape, dtype=torch.float64, device=like.device).index_copy(0, samples, weights.double())


def _errors(errors: Tensor, held_out: bool) -> tuple[float, ...]:
    return tuple(errors.tolist()) if held_out else (math.nan,) * len(errors)
