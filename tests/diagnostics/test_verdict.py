"""Is rank 1 enough? The verdict, on models whose answer is known."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.spectra import normal
from torch import Tensor, nn

from crl_kernels import Diagnosis, diagnose
from crl_kernels.diagnostics.verdict import judge


class LinearLoss(nn.Module):
    """loss_i = x_i . theta, so that g_i = x_i; or a least-squares loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.theta


def linear_loss(model: nn.Module, batch: Tensor, t: Tensor) -> Tensor:
    return model(batch)


def diagnosis_of(g: Tensor, **options) -> Diagnosis:
    return diagnose(LinearLoss(g.shape[1]), linear_loss, [g], (10, 500), samples=len(g), **options)


def test_rank_1_is_enough_where_gradients_share_one_direction():
    v = normal(20, seed=1)
    verdict = diagnosis_of((normal(128)[:, None] * 0.4 + 2) * v + 0.3 * normal(128, 20, seed=2)).verdict
    assert (verdict.answer, verdict.direction, verdict.use) == ("yes", "mean", "mean")
    assert verdict.enough_at == (10, 500)
    assert verdict.sentences[0].startswith("Rank 1 is enough here: with t uniform the mean gradient holds")
    assert 'direction="mean"' in verdict.sentences[2]


def test_collinear_gradients_of_both_signs_ask_for_the_top_eigenvector():
    """lambda_1 / trace is high, and the mean vanishes: signs alternate within every half."""
    v = normal(60, seed=1)
    v /= v.norm()
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(128)[:, None]
    diagnosis = diagnosis_of(3 * signs * v + 0.3 * normal(256, 60, seed=2))
    assert diagnosis.uniform.lambda1_share.value > 0.6
    assert not diagnosis.uniform.kappa.low > 0
    assert math.isnan(diagnosis.uniform.rho.value)
    assert (diagnosis.verdict.answer, diagnosis.verdict.direction, diagnosis.verdict.use) == ("yes", "top", "top")
    assert "along the top eigenvector and not along the mean gradient" in diagnosis.verdict.sentences[0]
    assert "lost in noise" in diagnosis.verdict.sentences[0]
    assert 'direction="top"' in diagnosis.verdict.sentences[2]


def test_at_a_least_squares_optimum_rank_1_is_not_enough():
    x, noise = normal(192, 40), normal(192, seed=1)
    y = x.sum(1) + noise
    model = LinearLoss(40)
    with torch.no_grad():
        model.theta.copy_(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return (model(batch[0]) - batch[1]).square() / 2

    diagnosis = diagnose(model, loss, [(x, y)], (10, 500), samples=192)
    assert diagnosis.uniform.kappa.value == pytest.approx(-1 / 191, rel=1e-6)  # the mean gradient is zero
    assert (diagnosis.verdict.answer, diagnosis.verdict.use) == ("no", "diagonal")
    assert diagnosis.verdict.not_at == (10, 500)
    assert diagnosis.verdict.sentences[0].startswith("Rank 1 is not enough here")
    assert "lost in noise" in diagnosis.verdict.sentences[0]
    assert 'kind="diagonal"' in diagnosis.verdict.sentences[2]


def test_few_directions_ask_for_their_rank():
    scale = torch.tensor([3.0, 3.0, 3.0, 3.0] + [0.5] * 16, dtype=torch.float64)
    verdict = diagnosis_of(normal(256, 20) * scale).verdict
    assert (verdict.answer, verdict.use) == ("no", "rank 4")
    assert "rank=4" in verdict.sentences[2]


def test_one_direction_for_each_timestep_asks_for_bands():
    """Every timestep has a direction of its own: F over all of them has rank 5 and flat eigenvalues."""
    times = [0, 1, 2, 3, 4]
    basis = torch.linalg.qr(normal(40, 5))[0].T

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        signed, noise = batch
        return model(3 * signed[:, None] * basis[t] + 0.1 * noise)

    data = normal(192), normal(192, 40, seed=1)
    generator = torch.Generator().manual_seed(0)
    diagnosis = diagnose(LinearLoss(40), loss, [data], times, num_timesteps=5, samples=192, generator=generator)
    assert diagnosis.verdict.enough_at == tuple(times)
    assert diagnosis.verdict.answer == "no"
    assert diagnosis.bands is not None
    assert diagnosis.bands.low > 0.9
    assert diagnosis.bands.value > diagnosis.uniform.held_out[4].value
    # Four of five directions hold half already; where they do not, the five timesteps' own are next.
    assert diagnosis.verdict.use == "rank 4"
    without_2_and_4 = {k: share for k, share in diagnosis.uniform.held_out.items() if k not in (2, 4)}
    verdict = judge(replace(diagnosis.uniform, held_out=without_2_and_4), diagnosis.at, diagnosis.bands)
    assert verdict.use == "bands"
    assert "strata" in verdict.sentences[2]
