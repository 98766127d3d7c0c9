"""Estimating a task's Fisher from its data, in one pass.

The empirical Fisher is F = mean_i g_i g_i^T over PER-SAMPLE gradients g_i, one for each sample's own loss. (The square
of a batch's mean gradient is another matrix, smaller by orders of magnitude.) Low rank: the first half of the data
gives the directions, the second half the curvatures along them, because a direction looks steeper on the samples that
it was fitted to.
"""

import math
import random
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .binding import Binding
from .fisher import DiagonalFisher, FisherStatistics, LowRankFisher

PerSampleLoss = Callable[[nn.Module, Any], Tensor]

_SMALL_RHO = 0.1


def estimate_fisher(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    loader: Iterable[Any],
    *,
    kind: Literal["low_rank", "diagonal"] = "low_rank",
    rank: int = 1,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    storage_dtype: torch.dtype | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> LowRankFisher | DiagonalFisher:
    """Estimates the empirical Fisher of a task at the model's present parameters, which become the anchor theta*.

    low_rank, rank 1:  u = mu / |mu| with mu the mean gradient over the first half of the data;
                       a = mean (u . g_i)^2 and the slope s = mean u . g_i over the second half
    low_rank, rank k:  u_1 .. u_k the top eigenvectors of F over the first half; a_k and s_k as above. Batches are
                       merged one after another into the best rank-(k + 8) sketch of the gradients seen so far.
    diagonal:          mean g_ij^2 over all the data, with theta*

    The model is in evaluation mode meanwhile. Its mode, gradients, buffers and the global random state are left as they
    were, also when the loss raises.

    Args:
        model: the model at the end of its task.
        per_sample_loss: ``(model, batch) -> (N,)``, one loss for each sample, computed from that sample alone. It is
            run under ``torch.func.vmap`` where it can be, and sample by sample, slowly, where it cannot.
        loader: batches, in random order: a tensor, or tuples, lists and dicts of tensors whose first dimension is the
            sample. Low rank needs its ``len``, or ``max_samples``, so that it can be cut in half.
        kind: ``"low_rank"`` or ``"diagonal"``.
        rank: directions of a low-rank Fisher.
        max_samples: stop after so many.
        generator: seeds the random numbers that the loss draws from the global generators (timesteps, noise).
        storage_dtype: of the directions: torch.float32 (the default), torch.bfloat16, or torch.float64 (the default for
            float64 models).
        include, exclude: patterns that choose parameters, as in :class:`LowRankHistory`.

    Returns:
        LowRankFisher or DiagonalFisher, with ``statistics``. Gradients are those of the loss as it is given: with the
        mean over an image's d values of the squared error the paper's lam applies; with half of the sum, multiply lam
        by 2 / d.

    Warns:
        UserWarning: when the directions hold less than a tenth of the trace of F.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it; non-finite gradients; a mean gradient of zero.

    Source: arXiv 2509.23593; held-out curvatures are ours.
    """
    if kind not in ("low_rank", "diagonal"):
        raise ValueError(f"kind is {kind!r}; expected 'low_rank' or 'diagonal'.")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; expected an integer >= 1.")
    if kind == "diagonal" and (rank != 1 or storage_dtype is not None):
        raise ValueError("rank= and storage_dtype= belong to kind='low_rank'.")
    if max_samples is not None and max_samples < 2:
        raise ValueError(f"max_samples is {max_samples}; expected at least 2.")
    binding = Binding(model, include, exclude)
    with _untouched(model, binding.device), torch.enable_grad():
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        gradients = _SampleGradients(model, binding, per_sample_loss)
        if kind == "diagonal":
            return _estimate_diagonal(binding, gradients, loader, max_samples)
        return _estimate_low_rank(binding, gradients, loader, rank, max_samples, storage_dtype)


def _estimate_diagonal(
    binding: Binding, gradients: "_SampleGradients", loader: Iterable[Any], max_samples: int | None
) -> DiagonalFisher:
    sum_squares = torch.zeros(binding.layout.numel, dtype=torch.float64, device=binding.device)
    count = 0
    for batch in _limited(loader, max_samples):
        matrix = gradients.matrix(batch)
        sum_squares += matrix.square().sum(0, dtype=torch.float64)
        count += len(matrix)
    if not count:
        raise ValueError("loader yields no samples.")
    diagonal = sum_squares / count
    if not bool(diagonal.any()):
        raise ValueError("every per-sample gradient is zero; check that the loss depends on the parameters.")
    return DiagonalFisher(
        binding.layout.split(diagonal.to(binding.dtype)),
        _anchor(binding),
        statistics=FisherStatistics(count, float(diagonal.sum())),
    )


def _estimate_low_rank(
    binding: Binding,
    gradients: "_SampleGradients",
    loader: Iterable[Any],
    rank: int,
    max_samples: int | None,
    storage_dtype: torch.dtype | None,
) -> LowRankFisher:
    dtype = storage_dtype or binding.dtype
    halves = _halves(loader, max_samples)
    sum_first = torch.zeros(binding.layout.numel, dtype=torch.float64, device=binding.device)
    sketch = sum_first.new_zeros(0, binding.layout.numel, dtype=binding.dtype)
    count_first = 0
    for batch in next(halves):
        if rank == 1:
            total, count = gradients.total(batch)
            sum_first += total
        else:
            matrix = gradients.matrix(batch)
            sum_first += matrix.sum(0, dtype=torch.float64)
            count, sketch = len(matrix), _top_rows(torch.cat([sketch, matrix]), rank + 8)
        count_first += count
    if rank > count_first:
        raise ValueError(f"rank is {rank}, but the first half of the data has only {count_first} samples; give more.")

    mean_first = sum_first / max(count_first, 1)
    if rank == 1:
        norm = mean_first.norm()
        if not bool(norm > 0):
            raise ValueError(
                "the mean gradient over the first half of the data is zero, so rank 1 has no direction. Use "
                "kind='diagonal', and check that the loss depends on the parameters."
            )
        directions = (mean_first / norm)[None].to(dtype)
    else:
        top = _top_rows(sketch, rank)
        directions = (top / top.norm(dim=1, keepdim=True)).to(dtype)

    u = directions.to(binding.dtype)
    sum_second = torch.zeros_like(sum_first)
    sum_square_norms = sum_first.new_zeros(())
    sum_projections, sum_square_projections = sum_first.new_zeros(rank), sum_first.new_zeros(rank)
    count_second = 0
    for batch in next(halves):
        matrix = gradients.matrix(batch)
        sum_second += matrix.sum(0, dtype=torch.float64)
        sum_square_norms += matrix.square().sum(dtype=torch.float64)
        projections = matrix @ u.T
        sum_projections += projections.sum(0, dtype=torch.float64)
        sum_square_projections += projections.square().sum(0, dtype=torch.float64)
        count_second += len(matrix)
    if not count_second:
        raise ValueError(
            f"loader ended after {count_first} samples, before the second half began. Give max_samples= the number of "
            "samples that it yields."
        )

    curvatures = sum_square_projections / count_second
    trace = float(sum_square_norms / count_second)
    rho = float(curvatures.sum()) / trace if trace > 0 else math.nan
    # The halves are independent, so the product of their means has no bias.
    mean_sq_norm = float(mean_first @ sum_second) / count_second
    count = count_first + count_second
    statistics = FisherStatistics(count, trace, mean_sq_norm, mean_sq_norm / trace if trace > 0 else math.nan, rho)
    if not rho >= _SMALL_RHO:
        what = "the mean gradient" if rank == 1 else f"the top {rank} directions"
        warnings.warn(
            f"only {rho:.1%} of the trace of the Fisher lies along {what} (rho = {rho:.3g}, from {count} samples): "
            "the low-rank penalty leaves most of this task's curvature free. Give more samples, a higher rank, or "
            "kind='diagonal'.",
            stacklevel=3,
        )
    return LowRankFisher(
        binding.layout.split(directions),
        curvatures,
        _anchor(binding),
        slopes=sum_projections / count_second,
        storage_dtype=dtype,
        statistics=statistics,
    )


def _anchor(binding: Binding) -> dict[str, Tensor]:
    return dict(zip(binding.layout.names, binding.params, strict=True))


def _top_rows(matrix: Tensor, count: int) -> Tensor:
    """``count`` orthogonal rows R for which R^T R is the best approximation of matrix^T matrix, largest first.

    From the small Gram matrix: eigenvectors of G = M M^T give R = V^T M.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix @ matrix.T).double())
    order = eigenvalues.argsort(descending=True)[:count]
    rows: Tensor = eigenvectors[:, order].T.to(matrix.dtype) @ matrix
    return rows


class _SampleGradients:
    """Per-sample gradients of the bound parameters, as a (N, P) matrix."""

    def __init__(self, model: nn.Module, binding: Binding, per_sample_loss: PerSampleLoss) -> None:
        self._model, self._layout, self._params, self._loss = model, binding.layout, binding.params, per_sample_loss
        self._vmap = True
        # torch.func needs a module that holds the model; the loss then meets the model with its parameters replaced.
        self._holder = _Holder(model, per_sample_loss)
        of = {id(parameter): name for name, parameter in self._holder.named_parameters()}
        self._raw_names = [of[id(parameter)] for parameter in binding.params]

    def total(self, batch: Any) -> tuple[Tensor, int]:
        """(sum of the gradients (P,) in float64, N): one ordinary backward pass."""
        count = batch_size(batch)
        gradients = torch.autograd.grad(self._losses(batch, count).sum(), self._params, allow_unused=True)
        return _finite(self._flat(gradients)).double(), count

    def matrix(self, batch: Any) -> Tensor:
        """(N, P), in the parameters' dtype, float32 at least."""
        count = batch_size(batch)
        if self._vmap:
            try:
                matrix = self._by_vmap(batch)
            except (RuntimeError, NotImplementedError) as error:
                self._losses(batch, count)  # a loss that fails by itself is the caller's error, and is raised here
                self._vmap = False
                warnings.warn(
                    f"the loss cannot be vectorised over samples, so it runs sample by sample, slowly: {error}",
                    stacklevel=4,
                )
        if not self._vmap:
            rows = []
            for i in range(count):
                sample = slice_batch(batch, i, i + 1)
                rows.append(torch.autograd.grad(self._losses(sample, 1).sum(), self._params, allow_unused=True))
            matrix = torch.stack([self._flat(row) for row in rows])
        return _finite(matrix)

    def _losses(self, batch: Any, count: int) -> Tensor:
        losses = _one_per_sample(self._loss(self._model, batch), count)
        if not losses.requires_grad:
            raise ValueError("per_sample_loss carries no gradient: compute it from model, outside of torch.no_grad().")
        return losses

    def _by_vmap(self, batch: Any) -> Tensor:
        leaves, structure = tree_flatten(batch)
        batched = [isinstance(leaf, Tensor) for leaf in leaves]

        def sample_loss(params: tuple[Tensor, ...], *sample: Any) -> Tensor:
            one = [leaf.unsqueeze(0) if is_tensor else leaf for leaf, is_tensor in zip(sample, batched, strict=True)]
            named = dict(zip(self._raw_names, params, strict=True))
            losses = torch.func.functional_call(self._holder, named, (tree_unflatten(one, structure),))
            return _one_per_sample(losses, 1).sum()

        gradients = torch.func.vmap(
            torch.func.grad(sample_loss),
            in_dims=(None, *(0 if is_tensor else None for is_tensor in batched)),
            randomness="different",
        )(tuple(parameter.detach() for parameter in self._params), *leaves)
        count = gradients[0].shape[0]
        return torch.cat([gradient.reshape(count, -1).to(self._dtype) for gradient in gradients], dim=1)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if any(p.dtype == torch.float64 for p in self._params) else torch.float32

    def _flat(self, gradients: Iterable[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                (torch.zeros_like(p) if gradient is None else gradient).reshape(-1).to(self._dtype)
                for gradient, p in zip(gradients, self._params, strict=True)
            ]
        )


def _one_per_sample(losses: object, count: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"per_sample_loss returned {got} for a batch of {count}; expected ({count},), one loss per sample, "
            "such as (error ** 2).mean(dim=(1, 2, 3))."
        )
    return losses


def _finite(gradients: Tensor) -> Tensor:
    if not bool(torch.isfinite(gradients).all()):
        raise ValueError("per_sample_loss has NaN or infinite gradients, and a Fisher of them would mean nothing.")
    return gradients


class _Holder(nn.Module):
    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        super().__init__()
        self.model, self.per_sample_loss = model, per_sample_loss

    def forward(self, batch: Any) -> Tensor:
        return self.per_sample_loss(self.model, batch)


def batch_size(batch: Any) -> int:
    """The common first dimension of a batch's tensors."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        raise ValueError(
            "loader yields batches whose tensors have no common first dimension; expected a tensor, or tuples, lists "
            "and dicts of tensors, whose first dimension is the sample."
        )
    return size


def slice_batch(batch: Any, begin: int, end: int) -> Any:
    """Samples ``begin`` to ``end`` of a batch."""
    leaves, structure = tree_flatten(batch)
    return tree_unflatten([leaf[begin:end] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _limited(loader: Iterable[Any], max_samples: int | None) -> Iterator[Any]:
    """Batches, the last one cut, up to ``max_samples`` samples."""
    left = math.inf if max_samples is None else max_samples
    for batch in loader:
        count = batch_size(batch)
        if count > left:
            batch, count = slice_batch(batch, 0, int(left)), int(left)
        if count:
            yield batch
        left -= count
        if left <= 0:
            return


def _samples_in(loader: Any, size: int) -> int | None:
    """How many samples a loader with first batches of ``size`` yields; None where nothing tells."""
    if isinstance(loader, (list, tuple)):
        return sum(batch_size(batch) for batch in loader)
    try:
        count = len(loader) * size
        return min(count, len(loader.dataset)) if hasattr(loader, "dataset") else count
    except TypeError:  # no len, or a stream behind a loader that claims to have one
        return None


def _halves(loader: Iterable[Any], max_samples: int | None) -> Iterator[Iterator[Any]]:
    """Two iterators over batches, to be used up one after the other: the first half of the samples, then the rest."""
    batches = _limited(loader, max_samples)
    first = next(batches, None)
    if first is None:
        raise ValueError("loader yields no samples.")
    known = [count for count in (max_samples, _samples_in(loader, batch_size(first))) if count is not None]
    if not known:
        raise ValueError("loader has no len, so it cannot be cut in half; give max_samples=.")
    half = min(known) // 2
    if half == 0:
        raise ValueError("loader yields one sample; low-rank estimation needs at least two, one for each half.")
    rest: list[Any] = []

    def first_half() -> Iterator[Any]:
        left, batch = half, first
        while batch is not None:
            count = batch_size(batch)
            if count > left:
                yield slice_batch(batch, 0, left)
                rest.append(slice_batch(batch, left, count))
                return
            yield batch
            left -= count
            if left == 0:
                return
            batch = next(batches, None)

    yield first_half()
    yield (batch for source in (rest, batches) for batch in source)


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Evaluation mode; then mode, buffers, gradients and global random state as they were, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    copies = [None if gradient is None else gradient.clone() for _, gradient in gradients]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
            for (parameter, gradient), copy in zip(gradients, copies, strict=True):
                if gradient is not None and copy is not None and not torch.equal(gradient, copy):
                    gradient.copy_(copy)
                parameter.grad = gradient
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
