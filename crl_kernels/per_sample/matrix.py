"""Statistics of a materialised matrix of per-sample gradients, each in one read of it.

    mean, sq_norms, projections = sample_gradient_stats(grads)      # grads: (N, P), row i is g_i
    gram = sample_gram(grads)

``SampleGradients`` computes the same from a model, without the matrix where the layers allow it.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import operators  # noqa: F401  (defines the operators)
from ..backends import reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SampleGradientStats(NamedTuple):
    """Statistics of per-sample gradients g_i, i = 1..N, of P elements."""

    mean: Tensor  # (P,) mu = mean_i g_i; float64 for float64 gradients, else float32
    sq_norms: Tensor  # (N,) float64: |g_i|^2
    projections: Tensor  # (N,) float64: g_i . mu or g_i . u; (N, K): g_i . u_k


class SampleGradientStatsWithDiagonal(NamedTuple):
    """The fields of SampleGradientStats, and the diagonal of the empirical Fisher."""

    mean: Tensor
    sq_norms: Tensor
    projections: Tensor
    diagonal: Tensor  # (P,) mean_i g_ij^2, of the mean's dtype


def _check_grads(grads: Tensor) -> None:
    if grads.dim() != 2 or grads.shape[0] == 0:
        raise ValueError(
            f"grads has shape {tuple(grads.shape)}, expected (N, P) with one row for each of N >= 1 samples; "
            "flatten and concatenate the parameters' gradients of each sample."
        )
    if grads.dtype not in _DTYPES:
        raise TypeError(f"grads is {grads.dtype}, expected float32, float64, bfloat16 or float16.")


def _directions(direction: Tensor, grads: Tensor) -> Tensor:
    """(K, P), contiguous, of the mean's dtype."""
    num_columns, dtype = grads.shape[1], reference.mean_dtype(grads.dtype)
    if direction.dim() not in (1, 2) or direction.shape[-1] != num_columns:
        raise ValueError(
            f"direction has shape {tuple(direction.shape)}, expected ({num_columns},) or (K, {num_columns}), "
            "as many elements as a row of grads."
        )
    if direction.dtype not in _DTYPES or torch.promote_types(direction.dtype, dtype) != dtype:
        raise TypeError(
            f"direction is {direction.dtype}, which {dtype} cannot represent; for {grads.dtype} gradients, "
            f"convert it with direction.to({dtype})."
        )
    if direction.device != grads.device:
        raise ValueError(f"direction is on {direction.device} and grads on {grads.device}: move one of them.")
    return (direction[None] if direction.dim() == 1 else direction).detach().to(dtype).contiguous()


@overload
def sample_gradient_stats(
    grads: Tensor, direction: Tensor | None = None, *, diagonal: Literal[False] = False
) -> SampleGradientStats: ...


@overload
def sample_gradient_stats(
    grads: Tensor, direction: Tensor | None = None, *, diagonal: Literal[True]
) -> SampleGradientStatsWithDiagonal: ...


def sample_gradient_stats(
    grads: Tensor, direction: Tensor | None = None, *, diagonal: bool = False
) -> SampleGradientStats | SampleGradientStatsWithDiagonal:
    """Mean, square norms and projections of per-sample gradients g_i, in one read of their matrix.

        mean = (1/N) sum_i g_i        sq_norms_i = |g_i|^2        projections_i = g_i . mean, or g_i . direction

    With ``diagonal=True``, the same read gives a fourth result, (1/N) sum_i g_ij^2. Projections use the mean as it is
    returned, rounded to its dtype.

    Sums are accumulated in float64. On a CPU, float32 and 16-bit gradients are first added in float32, in runs of at
    most 32 elements, unless squares would leave float32's range. So ``sq_norms`` and ``projections`` have an error of
    about 1e-8, relative to the magnitudes that are added; for float64 gradients it is 1e-15. The result is bitwise the
    same from run to run and for any number of threads. NaN and Inf pass through.

    The results are constants: they carry no derivative, whether or not ``grads`` requires one.

    Args:
        grads: (N, P), float32, float64, bfloat16 or float16. Rows may have any stride; a matrix whose columns are not
            adjacent, such as a transposed one, is copied first.
        direction: (P,) or (K, P), of one of these dtypes; float64 only with float64 ``grads``. On a GPU, the matrix is
            read once for every 16 directions.
        diagonal: also return the diagonal of the empirical Fisher.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    _check_grads(grads)
    directions = None if direction is None else _directions(direction, grads)
    mean, sq_norms, projections, *more = torch.ops.crl_kernels.sample_gradient_stats(
        grads.detach(), directions, diagonal
    )
    if direction is not None and direction.dim() == 1:
        projections = projections.squeeze(1)
    if diagonal:
        return SampleGradientStatsWithDiagonal(mean, sq_norms, projections, more[0])
    return SampleGradientStats(mean, sq_norms, projections)


def sample_gram(grads: Tensor) -> Tensor:
    """The Gram matrix of per-sample gradients, G_ij = g_i . g_j: (N, N) float64, exactly symmetric.

    Arguments, errors, (missing) derivatives and the arithmetic on a CPU are those of ``sample_gradient_stats``. On a
    GPU, tensor cores add float32 and 16-bit products in float32, in runs of 256 columns. So squares beyond float32's
    range become infinite, as in ``torch.mm``.
    """
    _check_grads(grads)
    result: Tensor = torch.ops.crl_kernels.sample_gram(grads.detach())
    return result
