"""Fishers of models that ``fully_shard`` has sharded, of which no process ever has more than FSDP gathers for a layer.

First pass, for mean directions: each process differentiates its own batches, and FSDP's reduction leaves each its shard
of the mean. Second pass: the processes that share one copy of the parameters all run the same sample, with the same
random numbers, so the mean over them that FSDP leaves is that sample's gradient, of which each process has its shard.
Square norms and projections are sums over shards, exchanged once for each batch. HSDP's copies run different samples.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import operators
from ..backends.int8 import Int8Vector
from ..distributed.fully_sharded import FullySharded
from ..distributed.processes import Processes
from ..model.binding import Binding
from ..model.preserved import seeded_random_numbers
from ..per_sample.batches import batch_size, class_name, reorder_batch, slice_batch
from ..per_sample.independence import differ
from .forms import DiagonalFisher, LowRankFisher
from .loss_source import LossSource, PerSampleLoss, require_finite_gradients
from .low_rank import LowRankEstimator, Stratum, scatter_weights
from .statistics import FisherStatistics


class ShardedLossSource(LossSource):
    """The per-sample losses of a sharded model, and its gradients: this process's parts of them."""

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: PerSampleLoss,
        binding: Binding,
        sharded: FullySharded,
        processes: Processes,
    ) -> None:
        super().__init__(model, per_sample_loss, binding, mixed_losses=False)
        if binding.shards.unsharded:
            raise ValueError(
                f"include= and exclude= leave only parameters that are whole, such as {binding.layout.names[0]!r}, and "
                "others of model are sharded; estimate in a block of crl_kernels.whole_parameters(model)."
            )
        self.sharded, self._processes = sharded, processes
        self._sharing = Processes(model, binding.shards.sharing_group)

    def batches_in_step(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """(batch, True) for each batch of this process, then (a sample of the last one, False) while another process
        has one: a pass needs all of them. On the first batch, checks that losses do not mix samples."""
        iterator, last = iter(batches), None
        while any(self._processes.gather((batch := next(iterator, None)) is not None)):
            is_own, last = batch is not None, last if batch is None else batch
            if not self._independence_settled:
                sizes = self._sharing.gather(batch_size(last))
                owner = sizes.index(max(sizes))
                for _, shared in self._exchanged(last if owner == self._sharing.rank else None):
                    self._check_independence(shared)
            yield last if is_own else slice_batch(last, 0, 1), is_own

    def _check_independence(self, batch: Any) -> None:
        """``batch`` is the same in all processes that share this copy, which run its losses together."""
        for _ in self.check_batches([batch]):
            pass

    def samples(self, batches: Iterable[Any]) -> Iterator[tuple[bool, Iterator[tuple[Tensor, Tensor, list[Tensor]]]]]:
        """For each batch of the processes that share this copy, one after the other: whether it is this process's; and
        for each of its samples the loss, (1,), the stratum, (1,), and this process's parts of the gradient."""
        iterator = iter(batches)
        with self.sharded.within_copies():
            while True:
                ended = True
                for is_own, batch in self._exchanged(next(iterator, None)):
                    ended = False
                    self._check_independence(batch)
                    yield is_own, self._gradients(batch)
                if ended:
                    return

    def _gradients(self, batch: Any) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        for i in range(batch_size(batch)):
            losses, labels = self.losses(slice_batch(batch, i, i + 1))
            losses.sum().backward()
            yield losses.detach(), labels, self.take_gradient()

    def take_gradient(self) -> list[Tensor]:
        """This process's parts of the gradients of the bound parameters, which are freed elsewhere."""
        params, names = self.binding.params, self.binding.layout.names
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        self.clear_gradients()
        return [part.detach() for part in self.binding.shards.local_gradients(names, gradients)]

    def require_same_losses(self, losses: Tensor) -> None:
        """Raises ValueError, in all processes of this copy, if a sample's loss is not the same in each."""
        largest, smallest = self.binding.shards.max_(torch.stack([losses, -losses]).double()).to(losses.dtype)
        if bool(differ(largest, -smallest).any()):
            raise ValueError(
                "per_sample_loss differs between processes for the same sample, which all processes that share a "
                "sharded model run together. Let it draw random numbers from the global generators of torch, numpy or "
                "random alone, and broadcast buffers that differ, such as BatchNorm's statistics; or estimate in a "
                "block of crl_kernels.whole_parameters(model)."
            )

    def _exchanged(self, batch: Any | None) -> Iterator[tuple[bool, Any]]:
        """The batches of the processes that share this copy and have one; in each of them, the random numbers that are
        drawn with it are the same in all processes, and those of its owner afterwards continue."""
        device, sharing = self.binding.shards.device, self._sharing
        data = torch.zeros(0, dtype=torch.uint8) if batch is None else _packed(batch)
        lengths = torch.zeros(sharing.count, dtype=torch.int64, device=device)
        lengths[sharing.rank] = len(data)
        for rank, length in enumerate(sharing.sum_(lengths).tolist()):
            if length:
                is_own = rank == sharing.rank
                message = data.to(device) if is_own else torch.empty(length, dtype=torch.uint8, device=device)
                seed, received = _unpacked(sharing.broadcast_(message, rank), device)
                with seeded_random_numbers(device, seed):
                    yield is_own, batch if is_own else received


def _packed(batch: Any) -> Tensor:
    """A seed, drawn now, and a batch, as bytes; or the error that says why it cannot be sent."""
    buffer = io.BytesIO()
    try:
        # Reordered, because a slice would be stored with the whole tensor that it is a view of.
        copied = reorder_batch(batch, torch.arange(batch_size(batch)))
        torch.save((int(torch.randint(2**62, ())), copied), buffer)
    except (AttributeError, TypeError, ValueError, RuntimeError, pickle.PicklingError) as reason:
        error = TypeError(
            f"loader yields a {class_name(batch)} that cannot be sent to the other processes of a sharded model "
            f"({reason}). Give tensors in tuples, lists or dicts, or estimate in a block of "
            "crl_kernels.whole_parameters(model)."
        )
        torch.save(error, buffer := io.BytesIO())
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor, device: torch.device) -> tuple[int, Any]:
    """Raises the owner's error, in all processes."""

    def to_own_device(storage: Any, place: str) -> Any:
        return storage if place == "cpu" else torch.serialization.default_restore_location(storage, str(device))

    packed = io.BytesIO(data.cpu().numpy().tobytes())
    content: Any = torch.load(packed, map_location=to_own_device, weights_only=False)
    if isinstance(content, TypeError):
        raise content
    seed, batch = content
    return seed, batch


class ShardedLowRankEstimator(LowRankEstimator):
    """Mean directions of a sharded model; vectors are this process's parts of them."""

    _source: ShardedLossSource

    def _sum_batches(self, batches: Iterable[Any]) -> list[Tensor]:
        source, losses_by_batch = self._source, []
        for batch, is_own in source.batches_in_step(batches):
            losses, labels = source.losses(batch)
            plan = self._plan_shared_sums(labels, is_own)
            for i, (stratum, part, weights) in enumerate(plan):
                (losses * weights).sum().backward(retain_graph=i + 1 < len(plan))
                totals = stratum.sums[part].split(source.binding.shards.lengths)
                for total, gradient in zip(totals, source.take_gradient(), strict=True):
                    total.add_(gradient.reshape(-1), alpha=source.sharded.mesh.size())
            losses_by_batch.append(losses.detach().double())
        return losses_by_batch

    def _plan_shared_sums(self, labels: Tensor, is_own: bool) -> list[tuple[Stratum, int, Tensor]]:
        """(stratum, part, weights of this process's losses): the same strata and parts in all processes. A stratum's
        first batches are split; later ones go to the smaller part."""
        own = labels if is_own else labels[:0]
        sizes = self._processes.gather({label: int((own == label).sum()) for label in own.unique().tolist()})
        plan = []
        for label in sorted({label for process_sizes in sizes for label in process_sizes}):
            stratum = self._strata.setdefault(label, Stratum(self._source.binding))
            members = (own == label).nonzero().flatten()
            counts = [process_sizes.get(label, 0) for process_sizes in sizes]
            if stratum.count:
                smaller = int(stratum.counts[1] < stratum.counts[0])
                parts = [(smaller, members, sum(counts))]
            else:
                first, second = members.tensor_split(2)
                parts = [(0, first, sum((n + 1) // 2 for n in counts)), (1, second, sum(n // 2 for n in counts))]
            for part, samples, count in parts:
                if count:
                    plan.append((stratum, part, scatter_weights(samples, torch.ones_like(samples), labels)))
                    stratum.counts[part] += count
        return plan

    def _exchange(self) -> None:
        self._strata = dict(sorted(self._strata.items()))

    def _project_batches(
        self, batches: Iterable[Any], vectors: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        source = self._source
        for is_own, samples in source.samples(batches):
            losses, labels, sums = [], [], []
            for loss, label, gradient in samples:
                norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in gradient]
                projections = operators.constant_projections(gradient, list(vectors), len(vectors))
                sums.append(torch.cat([torch.stack(norms).square().sum()[None], projections]))
                losses.append(loss)
                labels.append(label.to(vectors[0].device))
            source.require_same_losses(torch.cat(losses))
            table = require_finite_gradients(source.binding.shards.sum_(torch.stack(sums)))
            if is_own:
                yield torch.cat(losses), torch.cat(labels), table[:, 0], table[:, 1:]

    def _fisher(
        self, directions: Tensor, curvatures: Tensor, slopes: Tensor, statistics: FisherStatistics
    ) -> LowRankFisher:
        binding = self._source.binding
        anchor = [part.detach() for part in binding.shards.local(binding.params)]
        projections = operators.constant_projections(anchor, list(directions), len(directions))
        projections = binding.shards.sum_(projections)
        stored = Int8Vector.of(directions, binding.shards.shapes) if self._dtype == torch.int8 else directions
        return LowRankFisher._from_stored(
            binding.layout, stored, curvatures, projections, slopes, statistics, binding.shards
        )


def estimate_sharded_diagonal(
    source: ShardedLossSource, batches: Iterable[Any], processes: Processes
) -> DiagonalFisher:
    """mean g_ij^2 over all samples, one after the other."""
    binding, shards = source.binding, source.binding.shards
    sum_squares = torch.zeros(sum(shards.lengths), dtype=torch.float64, device=binding.device)
    parts, count = sum_squares.split(shards.lengths), 0
    for is_own, samples in source.samples(batches):
        losses = []
        for loss, _, gradient in samples:
            for part, own_gradient in zip(parts, gradient, strict=True):
                part.add_(own_gradient.reshape(-1).double().square())
            losses.append(loss)
        source.require_same_losses(torch.cat(losses))
        count += len(losses) * is_own
    count = sum(processes.gather(count))
    if not count:
        raise ValueError("loader yields no samples.")
    diagonal = require_finite_gradients(shards.sum_copies_(sum_squares), shards).div_(count)
    trace = float(shards.sum_(diagonal.sum()))
    if trace == 0:
        raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")
    anchor = torch.cat([part.detach().reshape(-1) for part in shards.local(binding.params)]).to(binding.dtype)
    statistics = FisherStatistics(count, trace)
    return DiagonalFisher._from_shards(binding.layout, diagonal.to(binding.dtype), anchor, statistics, shards)
