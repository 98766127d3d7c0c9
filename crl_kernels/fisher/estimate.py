"""Estimating a task's Fisher from its data, in one pass.

The empirical Fisher is F = mean_i g_i g_i^T over PER-SAMPLE gradients g_i, one for each sample's own loss. (The square
of a batch's mean gradient is another matrix, smaller by orders of magnitude.) Low rank: the first half of the data
gives the directions, the second half the curvatures along them, because the curvature along a direction is too large on
the samples that the direction was fitted to.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from ..distributed.fully_sharded import FullySharded, find_fully_sharded
from ..distributed.processes import Processes
from ..distributed.unsharded import whole_parameters
from ..model.arguments import require_generator, require_integer, require_switch
from ..model.binding import Binding
from ..model.preserved import preserved, require_no_inference_mode, same_random_numbers
from ..per_sample.loaders import generators_of, halves, limited, with_progress
from .forms import DiagonalFisher, LowRankFisher
from .loss_source import LossSource, PerSampleLoss, current_parameters, require_finite_gradients
from .low_rank import LowRankEstimator
from .sharded import ShardedLossSource, ShardedLowRankEstimator, estimate_sharded_diagonal
from .statistics import FisherStatistics, FisherWarning
from .validation import STORAGE_DTYPES

_SMALL_RHO = 0.1
_SMALL_SIGNAL = 0.5


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
    """Estimates a task's empirical Fisher at the model's present parameters, which become the anchor theta*.

        low_rank, "mean":  u = mu / |mu| with mu the mean gradient over the first half of the data
        low_rank, "top":   u_1 .. u_k the top eigenvectors of F over the first half
                           both: a_k = mean (u_k . g_i)^2 and the slopes s_k = mean u_k . g_i over the second half,
                           for the stored (rounded) u_k
        diagonal:          mean g_ij^2 over all the data, with theta*

    "top" needs only the batch's Gram matrix G: if G alpha = N lambda alpha, then sum_i alpha_i g_i / sqrt(N lambda) is
    an eigenvector of F, and one weighted sum of gradients. This is exact within one batch. Batches are merged one after
    another: the k + 8 rows of a batch with the largest eigenvalues join the k + 8 rows kept so far, and the best k + 8
    of them stay. In spectral norm, the error of the rows is at most the sum of the largest eigenvalues dropped at each
    step.
    Measured (tests/fisher/test_estimate.py): 25 batches of 32, eigenvalues 1/j in 200 dimensions, k = 1 and 3: merged
    directions contain more than 0.9998 of the trace along the best k. One backward pass computes all sums of a batch,
    so "top" costs two backward passes; a higher rank makes the sums longer and adds no pass.

    Strata: if per_sample_loss returns ``(losses, stratum)`` with an integer for each sample (a band of timesteps, a
    class), then F = sum_s p_s F_s: each stratum has its own ``rank`` directions, so the result has strata x rank terms,
    in ascending order of the strata, whose curvatures and slopes are p_s a_s and p_s s_s, with p_s the stratum's share
    of the second half. ``statistics.strata`` has each stratum's own, ``statistics.term_strata`` the stratum of each
    term. A stratum with samples in only one half of the data is left out, with a warning. The number of strata does not
    change how many backward passes a batch costs; in the second half every sample is projected on two rows per stratum.
    A diagonal Fisher is the same with and without strata.

    During estimation the model is in evaluation mode, and hooks on its parameters' gradients are not called. Afterwards
    its mode, gradients, buffers, hooks and the global random state are as before, also when the loss raises.

    Several processes: if the model is in a DistributedDataParallel (the loss then gets the module inside) or sharded
    (FSDP2, HSDP), or with ``process_group=``, each process estimates from its own loader, and all return the Fisher of
    all their samples. Processes exchange sums and per-sample numbers once after each half.

    Sharded models (``fully_shard``) are never gathered: a process has its shards, and what FSDP gathers for a layer.
    Mean directions, with or without strata, and diagonals can be estimated so. The directions come from ordinary
    backward passes, each process with its own batches. Then all processes that share one copy of the parameters run the
    same sample, one sample at a time, with the same random numbers; HSDP's copies run different samples. The Fisher has
    this process's shards, and a history of the same model appends it without gathering. In a block of
    ``whole_parameters`` each process has the full parameters and runs its own samples in batches: every option works,
    and faster, if there is memory for it.

    ``SampleGradients`` measures which sample a row of a layer belongs to, and checks that every parameter's
    per-sample gradients add up to ordinary ones, on the first batch and on every batch with new shapes. This needs
    ceil(log_8 N) + 3 passes for a batch of N, so such a batch costs a few times as much as another. On the first batch,
    a loss that is new for this model is called five more times, or seven for few samples, with some samples exchanged
    for others, to detect losses that mix samples.

    Args:
        model: the model at the end of its task.
        per_sample_loss: ``(model, batch) -> (N,)``, one loss for each sample, computed from that sample alone; or
            ``(losses, stratum)``, see above. It may call the model any number of times, on any number of rows.
        loader: batches, in random order: tensors or numpy arrays whose first dimension is the sample, and lists of N
            captions or other things, in tuples, lists, dicts or other Mappings, dataclasses. Low rank needs its
            ``len``, or ``max_samples``, to split it into halves.
        kind: ``"low_rank"`` or ``"diagonal"``.
        rank: directions of a low-rank Fisher, for each stratum.
        direction: ``"mean"``, the default for rank 1, or ``"top"``, the default for a higher rank. Near an optimum the
            mean vanishes while gradients may still lie along one line; then use the top eigenvector.
        unbiased: False for the paper's estimate, whose directions AND curvatures come from all samples: with "mean", mu
            and c* = a / |mu|^2 are those of the paper's code; with "top", curvatures are the eigenvalues. Curvatures
            and rho are then too large and have no standard error. The estimate reads the loader twice, from the same
            random state, so that timesteps and noise are the same; |mu|^2 and kappa are still unbiased.
        max_samples: the largest number of samples to read, in each process.
        generator: seeds the random numbers that the loss draws from the global generators (timesteps, noise),
            differently in each process.
        storage_dtype: of the directions: torch.float32 (the default), torch.bfloat16, torch.float64 (the default for
            float64 models), or torch.int8; see ``LowRankFisher``.
        include, exclude: patterns that choose parameters, as in ``LowRankHistory``.
        process_group: of torch.distributed; its processes share the work.
        progress: show the number of processed samples on stderr.
        mixed_losses: True accepts losses that depend on other samples too; g_i is then the full gradient of loss i, at
            the cost of a backward pass for each sample.

    Returns:
        LowRankFisher or DiagonalFisher, with ``statistics``. Gradients are those of the loss as it is scaled. If the
        loss is the mean of the squared error over an image's d values, the paper's lam applies. If it is half of the
        sum, multiply lam by 2 / d for a penalty in the gradient, and by 4 / d^2 for the decoupled step, at the same
        learning rate. With slopes (``first_order``), which scale differently from curvatures, no lam is equivalent.

    Warns:
        FisherWarning: if the directions contain less than a tenth of the trace of F; if a mean direction is mostly
            noise, with a signal share below one half; if a stratum is left out.

    Raises:
        TypeError, ValueError: an invalid argument, by name; non-finite gradients; a mean gradient of zero; a loss that
            mixes samples; of a sharded model, ``direction="top"``, ``unbiased=False`` and ``mixed_losses=True``, and a
            loss that differs between the processes that run the same sample.
        RuntimeError: in torch.inference_mode().

    Memory in addition to the model: per parameter and stratum 16 bytes for sums in float64, which the second pass does
    without, and 8 for the direction and a mean; for one stratum at a time 8 more. So a rank-1 estimate without strata
    takes 32 bytes per parameter. In the first pass there are the sums of a batch besides (4 bytes per stratum, 8 in its
    first batch), with "top" about six sketches of k + 8 rows, and the memory of ``SampleGradients.weighted_sums``. Of a
    sharded model, all this of the process's shards alone, and the gradients of a training step instead of the last.

    Source: arXiv 2509.23593; held-out curvatures, strata and standard errors are additions of this library.
    """
    if kind not in ("low_rank", "diagonal"):
        raise ValueError(f"kind is {kind!r}; expected 'low_rank' or 'diagonal'.")
    require_integer("rank", rank, 1)
    if direction not in (None, "mean", "top"):
        raise ValueError(f"direction is {direction!r}; expected 'mean' or 'top'.")
    if direction == "mean" and rank > 1:
        raise ValueError(f"direction='mean' is one direction, and rank is {rank}; use direction='top', or rank=1.")
    if kind == "diagonal" and (rank, storage_dtype, direction, unbiased) != (1, None, None, True):
        raise ValueError("rank=, direction=, unbiased= and storage_dtype= belong to kind='low_rank'.")
    if storage_dtype not in (None, *STORAGE_DTYPES):
        raise TypeError(f"storage_dtype is {storage_dtype!r}; expected one of {STORAGE_DTYPES}.")
    if max_samples is not None:
        require_integer("max_samples", max_samples, 2)
    require_generator("generator", generator)
    for name, value in (("unbiased", unbiased), ("progress", progress), ("mixed_losses", mixed_losses)):
        require_switch(name, value)
    if not unbiased and isinstance(loader, Iterator):
        raise ValueError(
            "loader can be read only once, and unbiased=False reads it twice; give a DataLoader or a list."
        )
    require_no_inference_mode("estimate_fisher")
    sharded = find_fully_sharded(model)
    if sharded is not None:
        _require_shardable(
            sharded, direction or ("mean" if rank == 1 else "top"), unbiased, mixed_losses, process_group
        )
    with whole_parameters(model) if sharded is None else sharded.backward_passes() as group:
        binding = Binding(model, include, exclude)
        if storage_dtype == torch.int8:
            binding.shards.require_rows(binding.layout.names)
        processes = Processes(model, group if process_group is None else process_group)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if sharded is None:
            source, device = LossSource(model, per_sample_loss, binding, mixed_losses), binding.device
        else:
            source = ShardedLossSource(model, per_sample_loss, binding, sharded, processes)
            device = binding.shards.device
        with preserved(model, device), torch.enable_grad():
            if generator is not None:
                seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
                torch.manual_seed(seed + processes.rank)
            if kind == "diagonal":
                batches = with_progress(limited(loader, max_samples), "diagonal", progress)
                if isinstance(source, ShardedLossSource):
                    return estimate_sharded_diagonal(source, batches, processes)
                return _estimate_diagonal(source, batches, processes)
            direction = direction or ("mean" if rank == 1 else "top")
            estimator_type = LowRankEstimator if sharded is None else ShardedLowRankEstimator
            estimator = estimator_type(source, processes, rank, direction, storage_dtype or binding.dtype)
            if unbiased:
                parts = halves(loader, max_samples)
                estimator.find_directions(with_progress(next(parts), "directions", progress))
                samples, _ = estimator.project_samples(with_progress(next(parts), "curvatures", progress))
            else:
                with same_random_numbers(binding.device, generators_of(loader)):
                    batches = with_progress(limited(loader, max_samples), "directions", progress)
                    first = estimator.find_directions(batches)
                batches = with_progress(limited(loader, max_samples), "curvatures", progress)
                samples, second = estimator.project_samples(batches)
                _require_same_losses(first, second)
            fisher = estimator.fisher_from(samples, held_out=unbiased)
    _warn(fisher.statistics, rank, direction)
    return fisher


def _require_shardable(
    sharded: FullySharded, direction: str, unbiased: bool, mixed_losses: bool, process_group: Any
) -> None:
    """Raises ValueError for options that need the whole per-sample gradients of a sharded model."""
    whole = "if a process has memory for the whole model, estimate in a block of crl_kernels.whole_parameters(model)"
    if direction == "top":
        raise ValueError(
            f"direction is 'top', whose directions need whole per-sample gradients, and model is sharded; {whole}, or "
            "use rank=1 with direction='mean'."
        )
    if not unbiased or mixed_losses:
        option = "unbiased=False" if not unbiased else "mixed_losses=True"
        raise ValueError(f"{option} needs batches as they are, and a sharded model runs one sample at a time; {whole}.")
    if process_group is not None and distributed.get_rank(process_group) >= 0:  # members alone; Processes says so
        ranks, expected = (set(distributed.get_process_group_ranks(g)) for g in (process_group, sharded.group()))
        if ranks != expected:
            raise ValueError(
                f"process_group has the processes {sorted(ranks)}, and model is sharded over {sorted(expected)}; leave "
                f"process_group out; or, {whole}."
            )


def _estimate_diagonal(source: LossSource, batches: Iterable[Any], processes: Processes) -> DiagonalFisher:
    binding = source.binding
    sum_squares = torch.zeros(binding.layout.numel, dtype=torch.float64, device=binding.device)
    count = 0
    for batch in source.check_batches(batches):
        with source.sample_gradients(diagonal=True) as sg:
            losses, _ = source.losses(batch)
            sg.backward(losses)
        source.clear_gradients()
        sum_squares.add_(require_finite_gradients(binding.layout.flatten(sg.diagonal)), alpha=len(losses))
        count += len(losses)
    count = sum(processes.gather(count))
    if not count:
        raise ValueError("loader yields no samples.")
    diagonal = processes.sum_(sum_squares).div_(count)
    if not bool(diagonal.any()):
        raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")
    return DiagonalFisher(
        binding.layout.split(diagonal.to(binding.dtype)),
        current_parameters(binding),
        statistics=FisherStatistics(count, float(diagonal.sum())),
    )


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
        directions = "the mean gradient" if direction == "mean" else f"the top {rank} directions"
        finding = (
            f"only {statistics.rho:.1%} of the trace of the Fisher lies along {directions} "
            f"(rho = {statistics.rho:.3g}, from {statistics.num_samples} samples): the low-rank penalty "
            "leaves most of this task's curvature free."
        )
        advice = "crl_kernels.diagnose compares forms that may hold more: direction='top', a higher rank=, strata."
        warnings.warn(FisherWarning("rho", finding, advice), stacklevel=3)
    noisy = [part for part in statistics.strata or (statistics,) if not part.signal_share >= _SMALL_SIGNAL]
    if direction == "mean" and noisy:
        worst = max(noisy, key=lambda part: part.samples_needed)
        where = f" of stratum {', '.join(str(part.stratum) for part in noisy)}" if statistics.strata else ""
        need = (
            f"{worst.samples_needed:,.0f} would make it 0.9"
            if math.isfinite(worst.samples_needed)
            else "none is known to be enough"
        )
        finding = (
            f"the mean gradient{where} is mostly noise: its signal share is {worst.signal_share:.2f} with "
            f"{worst.num_samples} samples, and {need} (kappa = {worst.kappa:.2g} +- {1.96 * worst.kappa_se:.2g})."
        )
        advice = "Give a longer loader or a larger max_samples=, or use direction='top'."
        warnings.warn(FisherWarning("signal_share", finding, advice), stacklevel=3)
