"""Statistics of samples that did not choose the directions: trace, kappa, rho, and how far each may be off.

A few numbers a sample are enough: n_i = |g_i|^2, the sum over the directions of (u_k . g_i)^2, and projections on the
mean gradient of the samples that chose the directions. Standard errors are the jackknife's, without one sample at a
time: samples are independent, so no groups are needed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .fisher import FisherStatistics

_ENOUGH = 0.9  # the signal share that samples_needed aims at


@dataclass(frozen=True)
class MeanProjections:
    """Projections m . g_i on a mean gradient m of M other samples, and on the mean m_a of ``first_count`` of them."""

    on_mean: Tensor  # (N,) float64
    on_first: Tensor  # (N,) float64
    count: int  # M
    first_count: int


def jackknife_ratio(numerator: Tensor, denominator: Tensor) -> tuple[float, float]:
    """(mean numerator / mean denominator, its variance), each without one sample at a time; nan where undefined."""
    count = len(numerator)
    value = float(numerator.sum() / denominator.sum())
    if count < 2:
        return value, math.nan
    without_one = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return value, float((count - 1) / count * (without_one - without_one.mean()).square().sum())


def statistics_of(
    sq_norms: Tensor,
    along: Tensor,
    means: MeanProjections,
    *,
    held_out: bool,
    curvature_se: tuple[float, ...],
    stratum: int | None = None,
    share: float = 1.0,
    strata: tuple[FisherStatistics, ...] = (),
) -> FisherStatistics:
    """The statistics of N samples with square norms ``sq_norms`` and sums ``along`` of squared projections, (N,).

    Held out:  |mu|^2 = mean_i m . g_i, the product of two independent means, and kappa = |mu|^2 / mean n_i.
    Not:       m is the samples' own mean, and |mu|^2 = (N |m|^2 - mean n_i) / (N - 1).

    The variance of kappa has a part from the N samples, given m, which the jackknife finds, and one from m, which is
    mu^T Cov mu / M over the square of the trace: the covariance of the projections on the means of two separate parts
    of the M samples has just mu^T Cov mu as its expectation, while the variance of the projections on m would count the
    noise of m twice.
    """
    count = len(sq_norms)
    trace = float(sq_norms.mean())
    rho, rho_variance = jackknife_ratio(along, sq_norms)
    kappa, kappa_variance = jackknife_ratio(means.on_mean, sq_norms)
    sq_norm = float(means.on_mean.mean())
    if held_out:
        kappa_variance += _variance_from_mean(means) / trace**2 if trace > 0 else math.nan
        num_samples = count + means.count
    else:
        sq_norm = (count * sq_norm - trace) / (count - 1) if count > 1 else math.nan
        kappa = sq_norm / trace if trace > 0 else math.nan
        rho_variance = kappa_variance = math.nan
        num_samples = count
    signal = min(max(kappa, 0.0), 1.0) if not math.isnan(kappa) else math.nan
    odds = means.count * signal  # signal : noise = M kappa : 1 - kappa
    needed = _ENOUGH / (1 - _ENOUGH) * (1 - signal) / signal if signal else math.inf
    return FisherStatistics(
        num_samples,
        trace,
        sq_norm,
        kappa,
        rho,
        curvature_se=curvature_se,
        rho_se=math.sqrt(rho_variance),
        kappa_se=math.sqrt(kappa_variance),
        signal_share=odds / (odds + 1 - signal),
        samples_needed=needed if not math.isfinite(needed) else float(math.ceil(needed * num_samples / means.count)),
        stratum=stratum,
        share=share,
        strata=strata,
    )


def _variance_from_mean(means: MeanProjections) -> float:
    """mu^T Cov mu / M, not below zero; nan if the mean was not made of two parts."""
    rest = means.count - means.first_count
    if not means.first_count or not rest or len(means.on_mean) < 2:
        return math.nan
    on_rest = (means.count * means.on_mean - means.first_count * means.on_first) / rest
    covariance = torch.cov(torch.stack([means.on_first, on_rest]))[0, 1]
    return max(float(covariance), 0.0) / means.count


def curvature_of(squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean, standard error) over ``count`` samples, of squared projections (M, k); those of all others are zero."""
    mean = squares.sum(0) / count
    if count < 2:
        return mean, torch.full_like(mean, math.nan)
    variance = (squares.square().sum(0) - count * mean.square()).clamp(min=0) / (count - 1)
    return mean, (variance / count).sqrt()
