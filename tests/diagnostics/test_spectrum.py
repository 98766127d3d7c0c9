"""Spectra from Gram matrices: against dense computations, and the coverage of their intervals."""

import math

import numpy as np
import pytest
import torch
from helpers.spectra import normal, spectrum

from crl_kernels.diagnostics.spectrum import _student, spectrum_of


def test_eigenvalues_in_sample_are_those_of_the_fisher():
    g = normal(64, 12) * torch.linspace(3, 0.2, 12)
    measured = spectrum(g)
    expected = torch.linalg.eigvalsh(g.T @ g / 64).flip(0)
    trace = float(expected.sum())
    assert measured.trace.value == pytest.approx(trace, rel=1e-12)
    assert measured.eigenvalues[:12] == pytest.approx((expected / trace).tolist(), rel=1e-9)
    assert measured.lambda1_share.value == pytest.approx(float(expected[0]) / trace, rel=1e-12)
    assert measured.lambda2_over_lambda1.value == pytest.approx(float(expected[1] / expected[0]), rel=1e-12)
    assert measured.stable_rank.value == pytest.approx(trace / float(expected[0]), rel=1e-12)


def test_unbiased_quantities_are_means_over_different_samples():
    """The closed forms against loops over i, j and k."""
    g = normal(48, 5) + 0.7
    gram = g @ g.T
    n = len(g)
    different = [(i, j) for i in range(n) for j in range(n) if i != j]
    mean_sq = sum(float(gram[i, j]) for i, j in different) / len(different)
    fro = sum(float(gram[i, j]) ** 2 for i, j in different) / len(different)
    along = np.mean([float(gram[i, j] * gram[j, k]) for i, j in different for k in range(n) if k not in (i, j)])
    trace_sq = sum(float(gram[i, i] * gram[j, j]) for i, j in different) / len(different)
    cos = np.mean(
        [abs(float(torch.cosine_similarity(g[i], torch.cat([g[:i], g[i + 1 :]]).mean(0), dim=0))) for i in range(n)]
    )
    trace = float(gram.diagonal().mean())
    measured = spectrum(g)
    assert measured.kappa.value == pytest.approx(mean_sq / trace, rel=1e-10)
    assert measured.rho.value == pytest.approx(along / (mean_sq * trace), rel=1e-10)
    assert measured.participation_ratio.value == pytest.approx(trace_sq / fro, rel=1e-10)
    assert measured.mean_abs_cos.value == pytest.approx(cos, rel=1e-10)


def test_held_out_shares_and_errors_are_those_of_a_dense_computation():
    g = normal(96, 7) * torch.tensor([3.0, 2.0, 1, 1, 0.5, 0.5, 0.5]) + 0.4
    measured = spectrum(g, ranks=(1, 2, 4))
    halves = g[:48], g[48:]
    held, trace, mean = torch.zeros(7, dtype=g.dtype), 0.0, 0.0
    caught, fro = torch.zeros(7, dtype=g.dtype), 0.0
    for train, test in (halves, halves[::-1]):
        v = torch.linalg.eigh(train.T @ train)[1].flip(1)
        p = (test @ v).square()
        held += p.mean(0)
        trace += float(test.square().sum(1).mean())
        u = train.mean(0) / train.mean(0).norm()
        mean += float((test @ u).square().mean())
        off = ~torch.eye(48, dtype=torch.bool)
        caught += (p.T[:, :, None] * p.T[:, None, :])[:, off].mean(1)
        fro += float((test @ test.T).square()[off].mean())
    for k in (1, 2, 4):
        assert measured.held_out[k].value == pytest.approx(float(held[:k].sum()) / trace, rel=1e-9)
        assert measured.error[k].value == pytest.approx(math.sqrt(1 - float(caught[:k].sum()) / fro), rel=1e-9)
    assert measured.held_out_mean.value == pytest.approx(mean / trace, rel=1e-9)
    assert measured.top_over_mean.value == pytest.approx((float(held[0]) - mean) / trace, rel=1e-9)


def test_exact_rank_1_has_share_1_and_error_0():
    measured = spectrum((normal(64) + 1)[:, None] * normal(9, seed=1))
    assert measured.held_out[1].value == pytest.approx(1, abs=1e-12)
    assert measured.held_out_mean.value == pytest.approx(1, abs=1e-12)
    assert measured.error[1].value == pytest.approx(0, abs=1e-6)
    assert measured.error_mean.value == pytest.approx(0, abs=1e-6)
    assert measured.lambda2_over_lambda1.value == pytest.approx(0, abs=1e-12)
    assert measured.participation_ratio.value == pytest.approx(1, rel=0.2)


def test_the_diagonal_is_exact_where_the_fisher_is_diagonal():
    """One coordinate a sample: G is block-like, and F is diagonal with equal entries in every group."""
    g = torch.eye(4, dtype=torch.float64).repeat(16, 1)
    measured = spectrum(g)
    # |F|^2 over different samples: 15 of the 63 others share the coordinate; sum F_jj^2 = 4 / 16.
    assert measured.error_diagonal.value == pytest.approx(math.sqrt(max(0.0, 1 - 0.25 / (15 / 63))), abs=1e-9)
    dense = spectrum(normal(64)[:, None].expand(64, 30) * 1.0)  # all coordinates equal: F = s 11^T
    assert dense.error_diagonal.value == pytest.approx(math.sqrt(1 - 1 / 30), abs=0.01)


def binomial_low(n: int, p: float, chance: float) -> int:
    """The largest k for which a binomial (n, p) variable is below k with at most that chance."""
    below = 0.0
    for k in range(n + 1):
        below += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if below > chance:
            return k
    return n


def test_intervals_cover_at_their_level():
    """F = I s + mu mu^T known: kappa, trace and the diagonal's error; and the held-out share against its own mean."""
    scale = torch.tensor([2.0, 1.0, 1.0, 0.7, 0.5, 0.5], dtype=torch.float64)
    mu = torch.tensor([1.0, 0.5, 0, 0, 0, 0], dtype=torch.float64)
    fisher = torch.diag(scale.square()) + torch.outer(mu, mu)
    trace = float(fisher.trace())
    true = {
        "trace": trace,
        "kappa": float(mu.square().sum()) / trace,
        "error_diagonal": math.sqrt(1 - float(fisher.diagonal().square().sum() / fisher.square().sum())),
    }
    trials = 200
    measured = [spectrum(normal(128, 6, seed=100 + i) * scale + mu, ranks=(1,)) for i in range(trials)]
    true["held_out"] = float(np.mean([s.held_out[1].value for s in measured]))
    for name, value in true.items():
        estimates = [s.held_out[1] if name == "held_out" else getattr(s, name) for s in measured]
        covered = sum(e.low <= value <= e.high for e in estimates)
        assert covered >= binomial_low(trials, 0.95, 1e-3), name
        spread = np.std([e.value for e in estimates])
        width = np.mean([e.high - e.low for e in estimates])
        assert width < 2 * 1.5 * 2.131 * spread, f"{name}: covering by being too wide"


def test_the_students_quantile():
    assert _student(15) == pytest.approx(2.131450, abs=2e-4)
    assert _student(255) == pytest.approx(1.969311, abs=2e-4)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(50), r"shape \(50, 50\); expected \(N, N\) with N a multiple of 16"),
        (torch.eye(32), "at least 48"),
        (torch.full((48, 48), math.nan), "NaN or infinite"),
    ],
)
def test_a_gram_matrix_that_cannot_be_used(gram, message):
    with pytest.raises(ValueError, match=message):
        spectrum_of(gram)
    with pytest.raises(ValueError, match="diagonals has shape"):
        spectrum_of(torch.eye(48), torch.eye(3))
