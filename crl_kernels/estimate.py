"""Estimating a task's Fisher from its data, in one pass.

The empirical Fisher is F = mean_i g_i g_i^T over PER-SAMPLE gradients g_i, one for each sample's own loss. (The square
of a batch's mean gradient is another matrix, smaller by orders of magnitude.) Low rank: the first half of the data
gives the directions, the second half the curvatures along them, because a direction looks steeper on the samples that
it was fitted to.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batches import batch_size, generators_of, halves, limited, shown
from .binding import Binding
from .fisher import DiagonalFisher, FisherStatistics, LowRankFisher
from .held_out import MeanProjections, curvature_of, statistics_of
from .independence import require_independent_losses
from .preserved import preserved, require_no_inference_mode, same_random_numbers
from .processes import Processes
from .sample_gradients import SampleGradients
from .unsharded import whole_parameters

PerSampleLoss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]

_SMALL_RHO = 0.1
_SMALL_SIGNAL = 0.5
_OVERSAMPLING = 8  # rows of a sketch beyond the rank


def estimate_fisher(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    loader: Iterable[Any],
    *,
    kind: Literal["low_rank", "diagonal"] = "low_rank",
    rank: int = 1,
    direction: Literal["mean", "top"] | None = None,
    unbiased: bool = True,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    storage_dtype: torch.dtype | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    process_group: Any = None,
    progress: bool = False,
    mixed_losses: bool = False,
) -> LowRankFisher | DiagonalFisher:
    """Estimates the empirical Fisher of a task at the model's present parameters, which become the anchor theta*.

        low_rank, "mean":  u = mu / |mu| with mu the mean gradient over the first half of the data
        low_rank, "top":   u_1 .. u_k the top eigenvectors of F over the first half
                           either way a_k = mean (u_k . g_i)^2 and the slopes s_k = mean u_k . g_i over the second
                           half, for the u_k that is stored
        diagonal:          mean g_ij^2 over all the data, with theta*

    "top" needs only the batch's Gram matrix G: if G alpha = N lambda alpha, then sum_i alpha_i g_i / sqrt(N lambda) is
    an eigenvector of F, and one weighted sum of gradients. Within one batch that is exact. Batches are merged one after
    another: the best k + 8 rows of each, by eigenvalue, join the k + 8 rows kept so far, and the best k + 8 of all
    stay. In spectral norm the rows leave out no more than the sum of the largest eigenvalue dropped at each step.
    Measured (tests/test_estimate.py): 25 batches of 32, eigenvalues 1/j in 200 dimensions, k = 1 and 3: merged
    directions hold more than 0.9998 of the trace that the best k do. All sums of a batch are taken in one backward
    pass, so "top" costs two; a higher rank costs longer sums, and no passes.

    Strata: if per_sample_loss returns ``(losses, stratum)`` with an integer for each sample (a band of timesteps, a
    class), then F = sum_s p_s F_s: each stratum has its own ``rank`` directions, so the result has strata x rank terms,
    in ascending order of the strata, whose curvatures and slopes are p_s a_s and p_s s_s, with p_s the stratum's share
    of the second half. ``statistics.strata`` has each stratum's own, ``statistics.term_strata`` the stratum of each
    term. A stratum that only one half of the data has is left out, with a warning. The number of strata does not change
    how many backward passes a batch costs; in the second half every sample is projected on two rows for each. A
    diagonal Fisher is the same with and without strata.

    The model is in evaluation mode meanwhile, and hooks on its parameters' gradients are not called. Its mode,
    gradients, buffers, hooks and the global random state are left as they were, also when the loss raises.

    Several processes: if the model is in a DistributedDataParallel (the loss is then given the module inside) or
    sharded (FSDP2, HSDP), or with ``process_group=``, each process estimates from its own loader, sums and per-sample
    numbers are exchanged once after each half, and all processes return the same Fisher, that of all their samples. Of
    a sharded model each process has the whole parameters meanwhile, see ``whole_parameters``, and the Fisher that
    it returns is whole; a history that it is appended to keeps this process's shards of it.

    Which sample a row of a layer belongs to is measured, and every parameter's per-sample gradients are proven to add
    up to ordinary ones, on the first batch and on every batch with new shapes: see ``SampleGradients``, whose
    passes for that, ceil(log_8 N) + 3 for a batch of N, make such a batch cost a few times what another one does. On
    the first batch a loss that was not met before with this model is called five times more, or seven for few samples,
    with some samples exchanged for others, to notice losses that mix samples.

    Args:
        model: the model at the end of its task.
        per_sample_loss: ``(model, batch) -> (N,)``, one loss for each sample, computed from that sample alone; or
            ``(losses, stratum)``, see above. How often it calls the model, and on how many rows, is its own affair.
        loader: batches, in random order: tensors or numpy arrays whose first dimension is the sample, and lists of N
            captions or other things, in tuples, lists, dicts or other Mappings, dataclasses. Low rank needs its
            ``len``, or ``max_samples``, so that it can be cut in half.
        kind: ``"low_rank"`` or ``"diagonal"``.
        rank: directions of a low-rank Fisher, for each stratum.
        direction: ``"mean"``, the default for rank 1, or ``"top"``, which a higher rank implies. Near an optimum the
            mean vanishes while gradients still lie along one line; then the top eigenvector is the direction.
        unbiased: False for the paper's estimate, whose directions AND curvatures come from all samples: with "mean", mu
            and c* = a / |mu|^2 are those of the paper's code; with "top", curvatures are the eigenvalues. Curvatures
            and rho are then too large and have no standard error. Two passes over the loader, from the same random
            state, so that timesteps and noise are the same; |mu|^2 and kappa are free of bias all the same.
        max_samples: stop after so many, in each process.
        generator: seeds the random numbers that the loss draws from the global generators (timesteps, noise); other
            numbers in each process.
        storage_dtype: of the directions: torch.float32 (the default), torch.bfloat16, or torch.float64 (the default for
            float64 models).
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.
        process_group: of torch.distributed, over which to share the work.
        progress: show on stderr how many samples are done.
        mixed_losses: True takes losses that depend on other samples too; g_i is then the gradient of loss i by all
            that it depends on, at the cost of a backward pass for each sample.

    Returns:
        LowRankFisher or DiagonalFisher, with ``statistics``. Gradients are those of the loss as it is given: with the
        mean over an image's d values of the squared error the paper's lam applies; with half of the sum, multiply lam
        by 2 / d for a penalty in the gradient, and by 4 / d^2 for the decoupled step, at the same learning rate. With
        slopes (``first_order``), which scale otherwise than curvatures, no lam is equal.

    Warns:
        UserWarning: when the directions hold less than a tenth of the trace of F; when a mean direction is mostly
            noise, a signal share below one half; when a stratum is left out.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it; non-finite gradients; a mean gradient of zero; a
            loss that mixes samples.
        RuntimeError: in torch.inference_mode().

    Memory beside the model: 16 bytes per parameter and stratum for sums in float64, the directions twice, with strata
    a batch's sums (4 bytes, of its first batch 8), with "top" about six sketches of k + 8 rows; and what
    ``SampleGradients.weighted_sums`` says.

    Source: arXiv 2509.23593; held-out curvatures, strata and standard errors are ours.
    """
    if kind not in ("low_rank", "diagonal"):
        raise ValueError(f"kind is {kind!r}; expected 'low_rank' or 'diagonal'.")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; expected an integer >= 1.")
    if direction not in (None, "mean", "top"):
        raise ValueError(f"direction is {direction!r}; expected 'mean' or 'top'.")
    if direction == "mean" and rank > 1:
        raise ValueError(f"direction='mean' is one direction, and rank is {rank}; use direction='top', or rank=1.")
    if kind == "diagonal" and (rank, storage_dtype, direction, unbiased) != (1, None, None, True):
        raise ValueError("rank=, direction=, unbiased= and storage_dtype= belong to kind='low_rank'.")
    if max_samples is not None and max_samples < 2:
        raise ValueError(f"max_samples is {max_samples}; expected at least 2.")
    if not unbiased and isinstance(loader, Iterator):
        raise ValueError(
            "loader can be read only once, and unbiased=False reads it twice; give a DataLoader or a list."
        )
    require_no_inference_mode("estimate_fisher")
    with whole_parameters(model) as sharing:
        binding = Binding(model, include, exclude)
        processes = Processes(model, sharing if process_group is None else process_group)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        source = _Source(model, per_sample_loss, binding, mixed_losses)
        with preserved(model, binding.device), torch.enable_grad():
            if generator is not None:
                seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
                torch.manual_seed(seed + processes.rank)
            if kind == "diagonal":
                return _estimate_diagonal(source, shown(limited(loader, max_samples), "diagonal", progress), processes)
            direction = direction or ("mean" if rank == 1 else "top")
            estimate = _LowRankEstimate(source, processes, rank, direction, storage_dtype or binding.dtype)
            if unbiased:
                parts = halves(loader, max_samples)
                estimate.find_directions(shown(next(parts), "directions", progress))
                samples, _ = estimate.look_along_them(shown(next(parts), "curvatures", progress))
            else:
                with same_random_numbers(binding.device, generators_of(loader)):
                    first = estimate.find_directions(shown(limited(loader, max_samples), "directions", progress))
                samples, second = estimate.look_along_them(shown(limited(loader, max_samples), "curvatures", progress))
                _require_same_losses(first, second)
            fisher = estimate.fisher(samples, held_out=unbiased)
    _warn(fisher.statistics, rank, direction)
    return fisher


class _Source:
    """Per-sample losses of a model, checked, and gradients of weighted sums of them."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss, binding: Binding, mixed_losses: bool) -> None:
        self.model, self.binding, self._loss = model, binding, per_sample_loss
        self.stratified: bool | None = None
        self._may_mix = mixed_losses  # or is known not to

    def checked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; on the first one of several samples, whether losses mix them is looked at."""
        for batch in batches:
            if not self._may_mix:
                require_independent_losses(
                    "per_sample_loss",
                    self._loss,
                    lambda other: self.losses(other)[0],
                    batch,
                    self.model,
                    self.binding.device,
                )
                self._may_mix = batch_size(batch) > 1
            yield batch

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(losses, stratum), each (N,); all strata are 0 if the loss does not give them."""
        count = batch_size(batch)
        losses: Any = self._loss(self.model, batch)
        stratum = None
        if stratified := isinstance(losses, tuple) and len(losses) == 2:
            losses, stratum = losses
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"per_sample_loss returned {got} for a batch of {count}; expected ({count},), one loss per sample, "
                "such as (error ** 2).mean(dim=(1, 2, 3))."
            )
        if not losses.requires_grad:
            raise ValueError("per_sample_loss carries no gradient: compute it from model, outside of torch.no_grad().")
        if self.stratified not in (None, stratified):
            raise ValueError("per_sample_loss returned strata for some batches and none for others.")
        self.stratified = stratified
        if not stratified:
            return losses, torch.zeros(count, dtype=torch.int64, device=losses.device)
        if not isinstance(stratum, Tensor) or stratum.shape != (count,):
            got = f"shape {tuple(stratum.shape)}" if isinstance(stratum, Tensor) else f"a {type(stratum).__name__}"
            raise ValueError(
                f"per_sample_loss returned strata of {got} for a batch of {count}; expected a tensor ({count},)."
            )
        if stratum.is_floating_point() or stratum.is_complex() or stratum.dtype == torch.bool:
            raise TypeError(f"per_sample_loss returned strata of {stratum.dtype}; expected integers.")
        return losses, stratum.detach().to(losses.device, torch.int64)

    def sample_gradients(self, **options: Any) -> SampleGradients:
        return SampleGradients(self.model, include=self.binding.include, exclude=self.binding.exclude, **options)

    def forget_gradients(self) -> None:
        """.grad holds nothing of the caller's meanwhile, and nobody reads it."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def sum_of_gradients(self, losses: Tensor) -> Tensor:
        """sum_i g_i, (P,), by an ordinary backward pass."""
        params = self.binding.params
        gradients = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1).to(self.binding.dtype)
                for g, p in zip(gradients, params, strict=True)
            ]
        )


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("per_sample_loss has NaN or infinite gradients, and a Fisher of them would mean nothing.")
    return values


def _anchor(binding: Binding) -> dict[str, Tensor]:
    return dict(zip(binding.layout.names, binding.params, strict=True))


def _estimate_diagonal(source: _Source, batches: Iterable[Any], processes: Processes) -> DiagonalFisher:
    binding = source.binding
    sum_squares = torch.zeros(binding.layout.numel, dtype=torch.float64, device=binding.device)
    count = 0
    for batch in source.checked(batches):
        with source.sample_gradients(diagonal=True) as sg:
            losses, _ = source.losses(batch)
            sg.backward(losses)
        source.forget_gradients()
        sum_squares.add_(_finite(binding.layout.flatten(sg.diagonal)), alpha=len(losses))
        count += len(losses)
    count = sum(processes.gather(count))
    if not count:
        raise ValueError("loader yields no samples.")
    diagonal = processes.sum_(sum_squares) / count
    if not bool(diagonal.any()):
        raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")
    return DiagonalFisher(
        binding.layout.split(diagonal.to(binding.dtype)),
        _anchor(binding),
        statistics=FisherStatistics(count, float(diagonal.sum())),
    )


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


class _LowRankEstimate:
    """Two looks at the data: one that finds directions, and one along them."""

    def __init__(
        self, source: _Source, processes: Processes, rank: int, direction: str, storage_dtype: torch.dtype
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
            _finite(found.sums)
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
        plan = self._plan(stratum, _finite(sg.gram))
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
            columns = [torch.stack([stratum.double(), _finite(sg.sq_norms).double()], dim=1)]
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
            _anchor(binding),
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


def _require_same_losses(first: Tensor, second: Tensor) -> None:
    # 1 %: 16-bit models may round differently in the two passes, and other noise changes losses by much more.
    if first.shape != second.shape or not torch.allclose(
        first, second, rtol=0.01, atol=0.01 * float(first.abs().mean())
    ):
        raise ValueError(
            "loader or per_sample_loss gave other samples or noise in the second pass of unbiased=False, though the "
            "random state of torch, numpy and random was the same. Let both draw from those, or from generator=."
        )


def _warn(statistics: FisherStatistics | None, rank: int, direction: str) -> None:
    assert statistics is not None
    if not statistics.rho >= _SMALL_RHO:
        what = "the mean gradient" if direction == "mean" else f"the top {rank} directions"
        warnings.warn(
            f"only {statistics.rho:.1%} of the trace of the Fisher lies along {what} (rho = {statistics.rho:.3g}, from "
            f"{statistics.num_samples} samples): the low-rank penalty leaves most of this task's curvature free. Give "
            "more samples, a higher rank, or kind='diagonal'.",
            stacklevel=3,
        )
    noisy = [part for part in statistics.strata or (statistics,) if not part.signal_share >= _SMALL_SIGNAL]
    if direction == "mean" and noisy:
        worst = max(noisy, key=lambda part: part.samples_needed)
        where = f" of stratum {', '.join(str(part.stratum) for part in noisy)}" if statistics.strata else ""
        need = f"{worst.samples_needed:,.0f} would make it 0.9" if math.isfinite(worst.samples_needed) else "no number"
        warnings.warn(
            f"the mean gradient{where} is mostly noise: its signal share is {worst.signal_share:.2f} with "
            f"{worst.num_samples} samples, and {need} (kappa = {worst.kappa:.2g} +- {1.96 * worst.kappa_se:.2g}). Give "
            "more samples, or use direction='top'.",
            stacklevel=3,
        )
