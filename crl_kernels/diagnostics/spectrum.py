"""``spectrum_of`` computes, from a Gram matrix, shares of a Fisher's trace and Frobenius errors, with intervals.

F = E[g g^T] over per-sample gradients g; G_ij = g_i . g_j over N samples. Estimates of functions of F are unbiased
(only products of different samples enter), or held out (directions from one half of the samples, and their share on the
other half; both ways, averaged), or in sample, where the name says so.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

RANKS = (1, 2, 4, 8, 16)
GROUPS = 16  # of the jackknife; groups 0 to 7 are the first half of the samples, groups 8 to 15 the second
KEPT_EIGENVALUES = 32
# Directions whose eigenvalue is below this share of the largest are dropped: they hold nothing, and projections on them
# divide by the eigenvalue's root, which turns errors of 1e-6 in a float32 Gram matrix into errors of 1e-3.
_NEGLIGIBLE = 1e-6
_CANCELLED = 1e-10


@dataclass(frozen=True)
class IntervalEstimate:
    """A value and its 95 % interval; nan where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.2g} [{self.low:.2g}, {self.high:.2g}]"

    @property
    def percent(self) -> str:
        """A share in words: ``16 % [13, 19]``."""
        return f"{100 * self.value:.2g} % [{100 * self.low:.2g}, {100 * self.high:.2g}]"


@dataclass(frozen=True)
class Spectrum:
    """Estimates about F from the Gram matrix of N samples, for one timestep (or t uniform) and one layer (or all).

    Unbiased, or a ratio of unbiased estimates:
        trace                  tr F = E |g|^2
        kappa                  |mu|^2 / tr F; can be below 0 when mu cannot be told from noise
        rho                    mu^T F mu / (|mu|^2 tr F), the share of the trace along the exact mean gradient; nan when
                               the interval of kappa reaches 0, because the direction of mu is then unknown
        participation_ratio    (sum l)^2 / sum l^2 over F's eigenvalues l
    Leave-one-out:
        mean_abs_cos           mean |cos(g_i, mean of the OTHER samples)|: the mean does not contain the sample itself
    In sample, biased upwards (lambda_1) by about what N samples of noise would give; intervals show the spread only:
        lambda1_share          lambda_1 / tr F
        lambda2_over_lambda1
        stable_rank            tr F / lambda_1
        eigenvalues            the first 32, as shares of the trace, without intervals
    Held out, and so a little below the share that the population's own directions hold:
        held_out_mean          share of the trace along the mean gradient
        held_out[k]            share of the trace along the top k eigenvectors; with lambda1_share above and
                               held_out[1] below, lambda_1 / tr F of the population lies between
        top_over_mean          held_out[1] - held_out_mean
        error_mean, error[k]   relative Frobenius error |F - Fhat|_F / |F|_F of Fhat = sum_k a_k u_k u_k^T with
                               a_k = u_k^T F u_k, the optimal c for the mean: sqrt(1 - sum_k a_k^2 / |F|_F^2)
        error_diagonal         the same of Fhat = diag F: sqrt(1 - sum_j F_jj^2 / |F|_F^2); nan without diagonals
    |F|_F^2 is the mean of G_ij^2 over i != j; G_ii^2 would add a term of order 1 / N that is no part of F.
    """

    num_samples: int
    trace: IntervalEstimate
    kappa: IntervalEstimate
    rho: IntervalEstimate
    participation_ratio: IntervalEstimate
    mean_abs_cos: IntervalEstimate
    lambda1_share: IntervalEstimate
    lambda2_over_lambda1: IntervalEstimate
    stable_rank: IntervalEstimate
    eigenvalues: tuple[float, ...]
    held_out_mean: IntervalEstimate
    held_out: dict[int, IntervalEstimate]
    top_over_mean: IntervalEstimate
    error_mean: IntervalEstimate
    error: dict[int, IntervalEstimate]
    error_diagonal: IntervalEstimate


def spectrum_of(gram: Tensor, diagonals: Tensor | None = None, ranks: Sequence[int] = RANKS) -> Spectrum:
    """All fields of ``Spectrum``, from a Gram matrix.

    Args:
        gram: (N, N), g_i . g_j of samples in random order; N a multiple of 16, at least 48. Sixteen consecutive runs
            of samples are the groups of the jackknife, the first eight of them the first half.
        diagonals: (16, 16), d_g . d_h of the diagonal Fishers d_g = mean of g_ij^2 over each group's samples. Products
            of different groups are unbiased for sum_j F_jj^2; |diag F|^2 of all samples is not.
        ranks: the k of ``held_out`` and ``error``; values above N / 4 are left out.

    Intervals are estimate +- t_15(0.975) s, with s the delete-one-group jackknife's standard error, or, for the
    eigenvalues in sample, that of the infinitesimal jackknife: the influence of sample i on lambda_k is
    (v_k . g_i)^2 - lambda_k. Shares and errors are cut off at 0 and 1.
    """
    n = len(gram)
    if gram.shape != (n, n) or n % GROUPS or n < 3 * GROUPS:
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}; expected (N, N) with N a multiple of {GROUPS}, at least {3 * GROUPS}."
        )
    if diagonals is not None and diagonals.shape != (GROUPS, GROUPS):
        raise ValueError(f"diagonals has shape {tuple(diagonals.shape)}; expected ({GROUPS}, {GROUPS}).")
    gram = gram.detach().double().cpu()
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            "gram has NaN or infinite entries: the loss has such gradients, so there is nothing to measure."
        )
    ranks = [k for k in ranks if k <= n // 4]
    if not bool(gram.diagonal().sum() > 0):
        return _zero_spectrum(n, ranks)

    group = torch.arange(n) // (n // GROUPS)
    everything = torch.ones(n, dtype=torch.bool)
    kept = [everything] + [group != g for g in range(GROUPS)]
    moments = torch.stack([_moments(gram[keep][:, keep]) for keep in kept])
    held = torch.stack(_held_out(gram, group, kept, ranks))
    trace, kappa, rho, participation, cosine = _intervals(moments[:, :5])
    if not kappa.low > 0:
        rho = IntervalEstimate(math.nan)
    first, second, stable, eigenvalues = _in_sample(gram)

    shares = _intervals(held[:, : 2 + len(ranks)])
    squares = held[:, 2 + len(ranks) :]
    if diagonals is not None:
        diagonals = diagonals.detach().double().cpu()
        sums = [diagonals] + [diagonals[rest][:, rest] for rest in (torch.arange(GROUPS) != g for g in range(GROUPS))]
        off = torch.stack([(q.sum() - q.trace()) / (len(q) * (len(q) - 1)) for q in sums])
        squares = torch.cat([squares, (1 - off / moments[:, 5])[:, None]], 1)
    errors = [_root(estimate) for estimate in _intervals(squares)]
    return Spectrum(
        num_samples=n,
        trace=trace,
        kappa=kappa,
        rho=rho,
        participation_ratio=participation,
        mean_abs_cos=_clipped(cosine),
        lambda1_share=_clipped(first),
        lambda2_over_lambda1=_clipped(second),
        stable_rank=stable,
        eigenvalues=eigenvalues,
        held_out_mean=_clipped(shares[0]),
        held_out={k: _clipped(share) for k, share in zip(ranks, shares[2:], strict=True)},
        top_over_mean=shares[1],
        error_mean=errors[0],
        error=dict(zip(ranks, errors[1 : 1 + len(ranks)], strict=True)),
        error_diagonal=errors[-1] if diagonals is not None else IntervalEstimate(math.nan),
    )


def _zero_spectrum(n: int, ranks: Sequence[int]) -> Spectrum:
    """The Spectrum of a layer whose gradients are all zero."""
    nan = IntervalEstimate(math.nan)
    values: dict[str, Any] = {field.name: nan for field in fields(Spectrum)}
    values |= {"num_samples": n, "trace": IntervalEstimate(0.0, 0.0, 0.0), "eigenvalues": ()}
    return Spectrum(**values | {"held_out": dict.fromkeys(ranks, nan), "error": dict.fromkeys(ranks, nan)})


def _moments(gram: Tensor) -> Tensor:
    """tr F, kappa, rho, participation ratio, mean |cos| and |F|_F^2."""
    n, own = len(gram), gram.diagonal()
    others = gram.sum(1) - own  # sum over j != i of g_i . g_j
    squares = gram.square().sum(1) - own.square()
    pairs = n * (n - 1)
    trace = own.mean()
    mean_sq = others.sum() / pairs
    frobenius_sq = squares.sum() / pairs
    along_mean = (others.square() - squares).sum() / (pairs * (n - 2))  # mu^T F mu, from i, j, k all different
    trace_sq = (own.sum().square() - own.square().sum()) / pairs
    rest_sq = gram.sum() - 2 * others - own  # |sum of the others|^2
    cosine = others / (own * rest_sq).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return torch.stack(
        [
            trace,
            mean_sq / trace,
            along_mean / (mean_sq * trace),
            trace_sq / frobenius_sq,
            cosine.abs().mean(),
            frobenius_sq,
        ]
    )


def _held_out(gram: Tensor, group: Tensor, kept: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """For each mask in ``kept``, one row: the share along the mean; the top direction's share minus the mean's; the
    shares of the top k; 1 - squared error of the mean and of the top k.

    Directions are u = sum_i c_i g_i over the samples of one half, so u . g_j = sum_i c_i G_ij for samples j of the
    other half.
    """
    half = group < GROUPS // 2
    most = max(ranks)
    known: dict[tuple[int, ...], Tensor] = {}  # leaving out a group changes the directions of its own half only

    def directions(samples: Tensor) -> Tensor:
        key = tuple(samples.tolist())
        if key not in known:
            block = gram[samples][:, samples]
            # A sum that cancels up to rounding errors has no direction, so its share is zero.
            sq_norm = block.sum()
            scale = sq_norm.rsqrt() if sq_norm > _CANCELLED * block.trace() else torch.zeros_like(sq_norm)
            known[key] = torch.cat([scale.expand(len(block), 1), top_coefficients(block, most)], 1)
        return known[key]

    results = []
    for keep in kept:
        parts = torch.nonzero(keep & half).flatten(), torch.nonzero(keep & ~half).flatten()
        held, trace, square, frobenius_sq = torch.zeros(4, 1, dtype=gram.dtype)
        for train, test in (parts, parts[::-1]):
            b = len(test)
            block = gram[test][:, test]
            projections = (gram[test][:, train] @ directions(train)).square()
            held = held + projections.mean(0)
            trace = trace + block.diagonal().mean()
            # (u^T F u)^2 and |F|_F^2, both from the pairs of different samples of this half, so that a matrix of exact
            # rank has an error of exactly 0.
            square = square + (projections.sum(0).square() - projections.square().sum(0)) / (b * (b - 1))
            frobenius_sq = frobenius_sq + (block.square().sum() - block.diagonal().square().sum()) / (b * (b - 1))
        share, caught = held / trace, square / frobenius_sq
        at = torch.tensor(ranks) - 1
        top, caught_top = share[1:].cumsum(0), caught[1:].cumsum(0)
        results.append(
            torch.cat([share[:1], share[1:2] - share[:1], top[at], 1 - caught[:1], 1 - caught_top[at]]).double()
        )
    return results


def top_coefficients(block: Tensor, count: int) -> Tensor:
    """(N, count) coefficients c of the orthonormal top directions v_k = sum_i c_ik g_i, from the Gram matrix (N, N)."""
    values, vectors = torch.linalg.eigh(block)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    good = values > _NEGLIGIBLE * values[0]
    return torch.where(good, vectors / values.clamp(min=1e-300).sqrt(), 0.0)


def _in_sample(gram: Tensor) -> tuple[IntervalEstimate, IntervalEstimate, IntervalEstimate, tuple[float, ...]]:
    n = len(gram)
    values, vectors = torch.linalg.eigh(gram / n)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    trace = gram.diagonal().mean()
    influence = values[:2] * (n * vectors[:, :2].square() - 1)  # on lambda_1 and lambda_2, (N, 2)
    first, second = influence[:, 0], influence[:, 1]
    of_trace = gram.diagonal() - trace
    share, ratio, stable = values[0] / trace, values[1] / values[0], trace / values[0]

    def interval(value: Tensor, psi: Tensor) -> IntervalEstimate:
        reach = _student(n - 1) * float(psi.square().sum() / (n * (n - 1))) ** 0.5
        return IntervalEstimate(float(value), float(value) - reach, float(value) + reach)

    return (
        interval(share, (first - share * of_trace) / trace),
        interval(ratio, (second - ratio * first) / values[0]),
        interval(stable, (of_trace - stable * first) / values[0]),
        tuple((values[:KEPT_EIGENVALUES] / trace).tolist()),
    )


def _intervals(table: Tensor) -> list[IntervalEstimate]:
    """Estimates from rows of values: of all samples first, then with each group left out."""
    values, replicates = table[0], table[1:]
    g = len(replicates)
    errors = ((g - 1) / g * (replicates - replicates.mean(0)).square().sum(0)).sqrt()
    reach = _student(g - 1) * errors
    return [IntervalEstimate(*row) for row in torch.stack([values, values - reach, values + reach], 1).tolist()]


def _student(degrees: int) -> float:
    """Student's t quantile at 0.975, by the first terms of its expansion; error below 2e-4 from 15 degrees on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + math.fsum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def _clipped(e: IntervalEstimate) -> IntervalEstimate:
    return IntervalEstimate(*(min(1.0, max(0.0, x)) if x == x else x for x in (e.value, e.low, e.high)))


def _root(e: IntervalEstimate) -> IntervalEstimate:
    return IntervalEstimate(*(math.sqrt(x) if x == x else x for x in asdict(_clipped(e)).values()))


def share_of_bands(projections: Tensor, overlaps: Tensor, sq_norms: Tensor) -> IntervalEstimate:
    """Share of the trace in the span of T directions: directions of one half on samples of the other half, both ways.

    projections (N, 2T), overlaps U U^T (2T, 2T): rows of the first half are the even ones. A sample's square norm in
    the span of U is p^T (U U^T)^-1 p.
    """
    n = len(projections)
    projections, overlaps, sq_norms = (x.detach().double().cpu() for x in (projections, overlaps, sq_norms))
    inside = torch.empty_like(sq_norms)
    for part, rows in ((slice(n // 2, n), slice(0, None, 2)), (slice(0, n // 2), slice(1, None, 2))):
        p = projections[part, rows]
        inside[part] = ((p @ torch.linalg.pinv(overlaps[rows, rows], rtol=_NEGLIGIBLE, hermitian=True)) * p).sum(1)
    group = torch.arange(n) // (n // GROUPS)
    kept = [torch.ones(n, dtype=torch.bool)] + [group != g for g in range(GROUPS)]
    return _clipped(_intervals(torch.stack([inside[keep].sum() / sq_norms[keep].sum() for keep in kept])[:, None])[0])
