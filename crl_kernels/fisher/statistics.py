"""Statistics of a Fisher estimate: trace, kappa, rho, signal share, and their standard errors.

They are computed from the samples that did not give the directions. A few numbers for each sample are enough:
n_i = |g_i|^2, the sum over the directions of (u_k . g_i)^2, and projections on the mean gradient of the samples that
gave the directions. Standard errors are from the jackknife, which leaves out one sample at a time: samples are
independent, so no groups are needed.
"""

import math
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.names import join_names


class FisherWarning(UserWarning):
    """What ``estimate_fisher`` warns of: a finding about the estimate, and what to do about it.

    A program that calls ``estimate_fisher`` for its own users can catch the warning and give advice in its own words.

    Attributes:
        kind: ``"rho"`` (the directions hold little of the trace), ``"signal_share"`` (the mean gradient is mostly
            noise), or ``"strata"`` (a stratum was left out).
        finding: the warning's text without its advice.
    """

    def __init__(self, kind: Literal["rho", "signal_share", "strata"], finding: str, advice: str) -> None:
        super().__init__(f"{finding} {advice}")
        self.kind, self.finding = kind, finding


@dataclass(frozen=True)
class FisherStatistics:
    """The number of samples of an estimate, how much of F it contains, and standard errors.

    Read rho first. mean_gradient_sq_norm and kappa are unbiased, so they may be below zero near an optimum, where the
    noise is larger than mu. 95 % intervals are value +- 1.96 se; an unknown value is nan. A diagonal Fisher has only
    num_samples and trace.

    Attributes:
        num_samples: N, in both halves and all processes.
        trace: tr F = mean |g_i|^2, in squared gradient units.
        mean_gradient_sq_norm: |mu|^2, without the bias tr(Cov) / N of |mean g_i|^2.
        kappa: |mu|^2 / tr F, the share of the trace that the mean gradient explains.
        rho: sum_k a_k / tr F, the share of the trace that lies along the directions; without strata these are
            orthonormal, so it is at most 1.
        curvature_se: standard error of each curvature of the Fisher, for fixed directions.
        rho_se, kappa_se: standard errors of rho, for fixed directions, and of kappa.
        signal_share: M kappa / (M kappa + 1 - kappa), the expected squared cosine between mu and the mean of the M
            samples that gave the directions. It equals 1 - 1 / (M k), up to a relative 1 / M, where k is the biased
            kappa of those M samples.
        samples_needed: N for which signal_share would be 0.9, 9 (1 - kappa) / kappa times N / M; inf if kappa <= 0.
        stratum: the stratum that these statistics describe; None for all the data.
        share: p_s, the stratum's share of the samples that gave the curvatures.
        strata: the statistics of each stratum, in the order of the Fisher's terms. They describe F_s, whose
            curvatures are the Fisher's divided by p_s.

    Raises:
        TypeError, ValueError: a field that is not a number or is out of range; the message names it.
    """

    num_samples: int
    trace: float
    mean_gradient_sq_norm: float = math.nan
    kappa: float = math.nan
    rho: float = math.nan
    curvature_se: tuple[float, ...] = ()
    rho_se: float = math.nan
    kappa_se: float = math.nan
    signal_share: float = math.nan
    samples_needed: float = math.nan
    stratum: int | None = None
    share: float = 1.0
    strata: tuple["FisherStatistics", ...] = ()

    def __post_init__(self) -> None:
        if not _is_integer(self.num_samples) or not (self.stratum is None or _is_integer(self.stratum)):
            raise TypeError(
                f"num_samples is {self.num_samples!r} and stratum {self.stratum!r}; expected integers, or no stratum."
            )
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; expected at least 1.")
        for name, (low, high, may_be_nan) in _RANGES.items():
            value = getattr(self, name)
            for number in value if name == "curvature_se" else (value,):
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    raise TypeError(f"{name} is {value!r}; expected a number.")
                if not (low <= number <= high or (may_be_nan and math.isnan(number))):
                    raise ValueError(f"{name} is {value!r}; expected {low} to {high}{', or nan' * may_be_nan}.")
        if not all(isinstance(part, FisherStatistics) for part in self.strata):
            raise TypeError(f"strata is {self.strata!r}; expected FisherStatistics.")

    @property
    def term_strata(self) -> tuple[int | None, ...]:
        """The stratum of each term of the Fisher."""
        return tuple(part.stratum for part in self.strata or (self,) for _ in part.curvature_se)

    @classmethod
    def _from_facts(cls, facts: Any) -> "FisherStatistics":
        """From a file's JSON, which has the fields as asdict() gives them. Raises TypeError or ValueError otherwise."""
        if not isinstance(facts, dict) or not {"num_samples", "trace"} <= facts.keys():
            raise ValueError(f"statistics are {facts!r}; expected at least num_samples and trace.")
        if unknown := facts.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"statistics have {join_names(sorted(unknown))}, which are not known.")
        known = dict(facts)
        for name in ("curvature_se", "strata"):
            known[name] = known.get(name, [])
            if not isinstance(known[name], list):
                raise TypeError(f"{name} is {known[name]!r}; expected a list.")
        known["curvature_se"] = tuple(known["curvature_se"])
        known["strata"] = tuple(map(cls._from_facts, known["strata"]))
        return cls(**known)


_LARGEST = sys.float_info.max
_RANGES = {  # lowest, highest, and whether it may be nan, for an unknown value
    "trace": (0.0, _LARGEST, False),
    "mean_gradient_sq_norm": (-_LARGEST, _LARGEST, True),
    "kappa": (-_LARGEST, _LARGEST, True),
    "rho": (0.0, _LARGEST, True),
    "curvature_se": (0.0, _LARGEST, True),
    "rho_se": (0.0, _LARGEST, True),
    "kappa_se": (0.0, _LARGEST, True),
    "signal_share": (0.0, 1.0, True),
    "samples_needed": (0.0, math.inf, True),
    "share": (0.0, 1.0, False),
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TARGET_SIGNAL_SHARE = 0.9  # for samples_needed


@dataclass(frozen=True)
class MeanProjections:
    """Projections m . g_i on a mean gradient m of M other samples, and on the mean m_a of ``first_count`` of them."""

    on_mean: Tensor  # (N,) float64
    on_first: Tensor  # (N,) float64
    count: int  # M
    first_count: int


def jackknife_ratio(numerator: Tensor, denominator: Tensor) -> tuple[float, float]:
    """(mean numerator / mean denominator, its jackknife variance); nan where undefined."""
    count = len(numerator)
    value = float(numerator.sum() / denominator.sum())
    if count < 2:
        return value, math.nan
    without_one = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return value, float((count - 1) / count * (without_one - without_one.mean()).square().sum())


def compute_statistics(
    sq_norms: Tensor,
    sq_projections: Tensor,
    means: MeanProjections,
    *,
    held_out: bool,
    curvature_se: tuple[float, ...],
    stratum: int | None = None,
    share: float = 1.0,
    strata: tuple[FisherStatistics, ...] = (),
) -> FisherStatistics:
    """The statistics of N samples from their square norms and their sums of squared projections, each (N,).

    held_out:      |mu|^2 = mean_i m . g_i, the product of two independent means, and kappa = |mu|^2 / mean n_i.
    not held_out:  m is the mean of the same samples, and |mu|^2 = (N |m|^2 - mean n_i) / (N - 1).

    The variance of kappa has two parts. One comes from the N samples, for fixed m; the jackknife estimates it. The
    other comes from m, and is mu^T Cov mu / M divided by the square of the trace. The covariance of the projections on
    the means of two separate parts of the M samples has the expectation mu^T Cov mu; the variance of the projections on
    m would count the noise of m twice.
    """
    count = len(sq_norms)
    trace = float(sq_norms.mean())
    rho, rho_variance = jackknife_ratio(sq_projections, sq_norms)
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
    needed = _TARGET_SIGNAL_SHARE / (1 - _TARGET_SIGNAL_SHARE) * (1 - signal) / signal if signal else math.inf
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
    """mu^T Cov mu / M, at least zero; nan if the mean does not have two parts."""
    rest = means.count - means.first_count
    if not means.first_count or not rest or len(means.on_mean) < 2:
        return math.nan
    on_rest = (means.count * means.on_mean - means.first_count * means.on_first) / rest
    covariance = torch.cov(torch.stack([means.on_first, on_rest]))[0, 1]
    return max(float(covariance), 0.0) / means.count


def curvature_and_error(squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean, standard error) of squared projections over ``count`` samples; ``squares`` is (M, k), and the other
    count - M samples have zeros."""
    mean = squares.sum(0) / count
    if count < 2:
        return mean, torch.full_like(mean, math.nan)
    variance = (squares.square().sum(0) - count * mean.square()).clamp(min=0) / (count - 1)
    return mean, (variance / count).sqrt()
