"""Low-rank estimates: the first pass over the data gives the directions, the second the curvatures along them."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.int8 import stored_values
from ..distributed.processes import Processes
from ..model.binding import Binding
from .forms import LowRankFisher
from .loss_source import LossSource, current_parameters, require_finite_gradients
from .statistics import FisherStatistics, FisherWarning, MeanProjections, compute_statistics, curvature_and_error

_OVERSAMPLING = 8  # rows of a sketch beyond the rank


class Stratum:
    """The gradients of one stratum in the first pass: sums of two parts of them, a sketch, and then the directions."""

    def __init__(self, binding: Binding) -> None:
        numel = sum(binding.shards.lengths)  # of this process's shards, if the model is sharded
        self.sums = torch.zeros(2, numel, dtype=torch.float64, device=binding.device)
        self.counts = [0, 0]
        self.sketch = torch.zeros(0, numel, dtype=binding.dtype, device=binding.device)
        self.directions = self.sketch  # (rank, P), rounded as they are stored, set after the first pass

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> Tensor:
        return self.sums.sum(0).div_(self.count)

    def forget_sums(self) -> None:
        """After the first pass: frees 16 bytes per parameter."""
        self.sums = self.sums.new_zeros(2, 0)

    def parts(self, members: Tensor) -> list[tuple[int, Tensor]]:
        """(part, its samples of a batch). Only the stratum's first batch is split; others go to the smaller part."""
        if not self.count and len(members) > 1:
            return list(enumerate(members.tensor_split(2)))
        return [(int(self.counts[1] < self.counts[0]), members)]

    def merge(self, rows: Tensor, count: int) -> None:
        self.sketch = _top_rows(torch.cat([self.sketch, rows]), count)


# A weighted sum of a batch's gradients: its stratum; the part of the samples, or None for a row of the sketch; the
# weights, (N,).
_WeightedSum = tuple[Stratum, int | None, Tensor]


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
class _SampleProjections:
    """A few numbers for each sample of the second pass, in float64 on the CPU."""

    labels: Tensor  # (N,) int64: the stratum of each sample
    sq_norms: Tensor  # (N,)
    projections: Tensor  # (N, rank) on the directions of the sample's stratum; 0 if it has none
    on_mean: Tensor  # (N, 2) on the mean of the sample's stratum, and on the mean of its first part
    on_overall_mean: Tensor  # (N, 2) the same for the mean over all strata


class LowRankEstimator:
    """Two passes over the data: one finds the directions, the other projects on them."""

    def __init__(
        self, source: LossSource, processes: Processes, rank: int, direction: str, storage_dtype: torch.dtype
    ) -> None:
        self._source, self._processes, self._rank, self._dtype = source, processes, rank, storage_dtype
        self._top, self._rows_kept = direction == "top", rank + _OVERSAMPLING
        self._strata: dict[int, Stratum] = {}

    @property
    def count(self) -> int:
        """The number of samples in the first pass."""
        return sum(stratum.count for stratum in self._strata.values())

    def find_directions(self, batches: Iterable[Any]) -> Tensor:
        """The first pass. Returns the losses, (N,)."""
        losses_by_batch = self._sum_batches(batches)
        self._exchange()
        for label, stratum in self._strata.items():
            require_finite_gradients(stratum.sums, self._source.binding.shards)
            where = f" of stratum {label}" if self._source.stratified else ""
            stratum.directions = self._directions_of(stratum, where)
        return torch.cat(losses_by_batch)

    def _sum_batches(self, batches: Iterable[Any]) -> list[Tensor]:
        """The sums and sketches of all strata. Returns the losses of each batch."""
        losses_by_batch = []
        for batch in self._source.check_batches(batches):
            losses, plan, sums = self._sum_batch(batch)
            losses_by_batch.append(losses.detach().double())
            sketch_rows: dict[Stratum, list[int]] = {}
            for i, (stratum, part, _) in enumerate(plan):
                if part is None:
                    sketch_rows.setdefault(stratum, []).append(i)
                else:
                    stratum.sums[part] += sums[i]
            for stratum, rows in sketch_rows.items():
                stratum.merge(sums[rows], self._rows_kept)
            del losses, sums  # before the next batch allocates its own
        return losses_by_batch

    def _sum_batch(self, batch: Any) -> tuple[Tensor, list[_WeightedSum], Tensor]:
        """A batch's losses, (N,), the plan of its gradients' weighted sums, and these sums, (len(plan), P)."""
        source = self._source
        if not self._top and source.stratified is False and self._strata:  # one sum, that of all samples
            losses, labels = source.losses(batch)
            return losses, self._plan_sums(labels), source.gradient_sum(losses)[None]
        with source.sample_gradients(gram=self._top) as sg:
            losses, labels = source.losses(batch)
            if not self._top:
                plan = self._plan_sums(labels)
                return losses, plan, sg.weighted_rows(losses, _weights(plan))
            sg.backward(losses, retain_graph=True)
        source.clear_gradients()
        assert sg.gram is not None
        plan = self._plan_sums(labels, require_finite_gradients(sg.gram))
        return losses, plan, sg.weighted_rows(losses, _weights(plan))

    def _plan_sums(self, labels: Tensor, gram: Tensor | None = None) -> list[_WeightedSum]:
        """The weighted sums of a batch's gradients: each stratum's parts, and with ``gram`` its top rows."""
        plan: list[_WeightedSum] = []
        for label in labels.unique().tolist():
            if label not in self._strata:
                self._strata[label] = Stratum(self._source.binding)
            stratum = self._strata[label]
            members = (labels == label).nonzero().flatten()
            for part, samples in stratum.parts(members):
                plan.append((stratum, part, scatter_weights(samples, torch.ones_like(samples), labels)))
                stratum.counts[part] += len(samples)
            if gram is not None:
                for weights in _top_eigenvectors(gram[members][:, members], self._rows_kept):
                    plan.append((stratum, None, scatter_weights(members, weights, labels)))
        return plan

    def _exchange(self) -> None:
        """Merges the strata of all processes; afterwards each process has the same ones."""
        if not self.count:
            raise ValueError("loader yields no samples.")
        # For each process: label -> (counts, rows of the sketch).
        sizes = self._processes.gather({label: (s.counts, len(s.sketch)) for label, s in self._strata.items()})
        local, self._strata = self._strata, {}
        for label in sorted({label for process_sizes in sizes for label in process_sizes}):
            stratum = self._strata[label] = local.get(label) or Stratum(self._source.binding)
            if len(sizes) == 1:
                continue
            self._processes.sum_(stratum.sums)
            stratum.counts = [sum(s[label][0][part] for s in sizes if label in s) for part in (0, 1)]
            local_sketch, stratum.sketch = stratum.sketch, stratum.sketch[:0]
            for process, process_sizes in enumerate(sizes):
                if rows := process_sizes[label][1] if label in process_sizes else 0:
                    is_local = process == self._processes.rank
                    sketch = local_sketch if is_local else local_sketch.new_empty(rows, local_sketch.shape[1])
                    stratum.merge(self._processes.broadcast_(sketch, process), self._rows_kept)

    def _directions_of(self, stratum: Stratum, where: str) -> Tensor:
        """(rank, P): what the storage dtype keeps of them."""
        if self._rank > stratum.count:
            raise ValueError(
                f"rank is {self._rank}, but the first half of the data{where} has only {stratum.count} samples; give "
                "more."
            )
        rows = _top_rows(stratum.sketch, self._rank) if self._top else stratum.mean[None]
        norms = self._norms(rows)[:, None]
        if not bool((norms > 0).all()):
            subject = f"the gradients{where} span fewer than {self._rank} directions and the next"
            subject = subject if self._top else f"the mean gradient{where}"
            raise ValueError(
                f"{subject} over the first half of the data is zero, so rank {self._rank} has no direction. Use "
                "kind='diagonal', and check that the loss depends on the parameters."
            )
        return stored_values(rows.div_(norms), self._source.binding.shards.shapes, self._dtype)

    def _norms(self, rows: Tensor) -> Tensor:
        """(K,): the norms of rows, over all shards."""
        norms = rows.norm(dim=1)
        shards = self._source.binding.shards
        return norms if shards.unsharded else shards.sum_(norms.square()).sqrt()

    def project_samples(self, batches: Iterable[Any]) -> tuple[_SampleProjections, Tensor]:
        """The second pass: square norms and projections on directions and means, of the samples of all processes; and
        this process's losses, (N,)."""
        binding = self._source.binding
        known_labels = torch.tensor(list(self._strata), device=binding.device)
        strata = list(self._strata.values())
        vectors = [vector for stratum in strata for vector in self._projected_vectors(stratum)]
        width, rank = len(vectors) // len(strata), self._rank
        first_count = sum(stratum.counts[0] for stratum in strata)
        shares = [(s.count / self.count, s.counts[0] / max(first_count, 1)) for s in strata]
        weights = torch.tensor(shares, dtype=torch.float64, device=binding.device)
        # With "mean", the projection on the mean is the one on the direction times its norm, up to storage rounding.
        norms = [1.0 if self._top else float(self._norms(stratum.mean[None])) for stratum in strata]
        mean_norms = torch.tensor(norms, dtype=torch.float64, device=binding.device)
        for stratum in strata:
            stratum.forget_sums()
        table_parts, losses_by_batch = [], []
        for losses, labels, sq_norms, projections in self._project_batches(batches, vectors):
            projections = projections.reshape(len(losses), len(strata), width)
            on_means = projections[..., -1 if self._top else 0] * mean_norms
            pairs = torch.stack([on_means, projections[..., rank]], dim=-1)
            # All False for a stratum that the first pass lacked.
            in_stratum = (labels[:, None] == known_labels)[..., None]
            columns = [torch.stack([labels.double(), require_finite_gradients(sq_norms)], dim=1)]
            columns += [(values * in_stratum).sum(1) for values in (projections[..., :rank], pairs)]
            columns.append((pairs * weights).sum(1))
            table_parts.append(torch.cat(columns, dim=1).detach())
            losses_by_batch.append(losses.detach().double())
        if not table_parts:
            raise ValueError(
                f"loader ended after {self.count} samples, before the second half began. Give max_samples= the number "
                "of samples that it yields."
            )
        table = torch.cat(self._processes.gather(torch.cat(table_parts).cpu()))
        labels, sq_norms, projections, on_mean, on_overall_mean = table.split([1, 1, rank, 2, 2], dim=1)
        samples = _SampleProjections(labels[:, 0].long(), sq_norms[:, 0], projections, on_mean, on_overall_mean)
        return samples, torch.cat(losses_by_batch)

    def _project_batches(
        self, batches: Iterable[Any], vectors: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each batch: losses, strata and square norms, (N,), and projections on K vectors, (N, K); in float64."""
        by_name = [self._source.binding.layout.split(vector) for vector in vectors]
        direction = {name: torch.stack([parts[name] for parts in by_name]) for name in by_name[0]}
        for batch in self._source.check_batches(batches):
            with self._source.sample_gradients(direction=direction) as sg:
                losses, labels = self._source.losses(batch)
                sg.backward(losses)
            self._source.clear_gradients()
            yield losses, labels, sg.sq_norms.double(), sg.projections.double()

    def _projected_vectors(self, stratum: Stratum) -> list[Tensor]:
        """The vectors to project on: the stored directions, the mean of the first part and, for "top", the mean."""
        vectors = [*stratum.directions, stratum.sums[0] / max(stratum.counts[0], 1)]
        if self._top:
            vectors.append(stratum.mean)
        return [vector.to(self._source.binding.dtype) for vector in vectors]

    def fisher_from(self, samples: _SampleProjections, *, held_out: bool) -> LowRankFisher:
        """The Fisher, with statistics; ``held_out`` if other samples gave the directions."""
        total = len(samples.sq_norms)
        squares = samples.projections.square()
        directions, curvatures, errors, slopes, strata = [], [], [], [], []
        incomplete = dict.fromkeys(set(samples.labels.tolist()) - set(self._strata), "second")
        for label, stratum in self._strata.items():
            members = samples.labels == label
            if not (count := int(members.sum())):
                incomplete[label] = "first"
                continue
            # Divided by the number of all samples, the curvature is p_s a_s; the error is that of this product.
            curvature, error = curvature_and_error(squares[members], total)
            directions.append(stratum.directions)
            curvatures.append(curvature)
            errors.append(error)
            slopes.append(samples.projections[members].sum(0) / total)
            if self._source.stratified:
                means = MeanProjections(
                    samples.on_mean[members, 0], samples.on_mean[members, 1], stratum.count, stratum.counts[0]
                )
                strata.append(
                    compute_statistics(
                        samples.sq_norms[members],
                        squares[members].sum(1),
                        means,
                        held_out=held_out,
                        curvature_se=_standard_errors(curvature_and_error(squares[members], count)[1], held_out),
                        stratum=label,
                        share=count / total,
                    )
                )
        if incomplete:
            finding = (
                "each stratum needs samples in both halves of the data, and is left out of the Fisher otherwise: "
                + ", ".join(f"{label} is only in the {half} half" for label, half in sorted(incomplete.items()))
                + "."
            )
            warnings.warn(FisherWarning("strata", finding, "Give more samples, or fewer strata."), stacklevel=3)
        if not directions:
            raise ValueError("per_sample_loss: no stratum has samples in both halves of the data; shuffle the loader.")
        first_count = sum(stratum.counts[0] for stratum in self._strata.values())
        statistics = compute_statistics(
            samples.sq_norms,
            squares.sum(1),
            MeanProjections(samples.on_overall_mean[:, 0], samples.on_overall_mean[:, 1], self.count, first_count),
            held_out=held_out,
            curvature_se=_standard_errors(torch.cat(errors), held_out),
            strata=tuple(strata),
        )
        return self._fisher(torch.cat(directions), torch.cat(curvatures), torch.cat(slopes), statistics)

    def _fisher(
        self, directions: Tensor, curvatures: Tensor, slopes: Tensor, statistics: FisherStatistics
    ) -> LowRankFisher:
        binding = self._source.binding
        return LowRankFisher(
            binding.layout.split(directions),
            curvatures,
            current_parameters(binding),
            slopes=slopes,
            storage_dtype=self._dtype,
            statistics=statistics,
        )


def _weights(plan: Sequence[_WeightedSum]) -> Tensor:
    return torch.stack([weights for _, _, weights in plan])


def scatter_weights(samples: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """(N,) weights in float64: ``weights`` at ``samples``, zero elsewhere."""
    return torch.zeros(like.shape, dtype=torch.float64, device=like.device).index_copy(0, samples, weights.double())


def _standard_errors(errors: Tensor, held_out: bool) -> tuple[float, ...]:
    return tuple(errors.tolist()) if held_out else (math.nan,) * len(errors)
