"""Stratified Fisher estimates, against a written-out computation."""

import math

import pytest
import torch
from helpers.fisher_problems import (
    IGNORE_ESTIMATE_WARNINGS,
    Network,
    data,
    gradients_by_loop,
    loss,
    loss_and_class,
    split_by_parameter,
    stratified,
)
from torch import Tensor

import crl_kernels as ck

pytestmark = IGNORE_ESTIMATE_WARNINGS


@pytest.mark.parametrize(("rank", "direction"), [(1, "mean"), (1, "top"), (2, "top")])
def test_strata_against_a_written_out_computation(rank, direction):
    model = Network().double()
    gradients = gradients_by_loop(model, 60)
    # One batch a half for "top", classes is exact within a batch.
    classes, batches = stratified(batch_size=7 if direction == "mean" else 30)
    fisher = ck.estimate_fisher(model, loss_and_class, batches, rank=rank, direction=direction)
    assert len(fisher) == 3 * rank
    statistics = fisher.statistics
    assert [part.stratum for part in statistics.strata] == [-1, 3, 8]
    assert statistics.term_strata == tuple(s for s in (-1, 3, 8) for _ in range(rank))

    moved = torch.randn(gradients.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected_penalty = 0.0
    for i, (stratum, part) in enumerate(zip((-1, 3, 8), statistics.strata, strict=True)):
        first, second = (half[which_half == stratum] for half, which_half in _halves(gradients, classes))
        terms = slice(i * rank, (i + 1) * rank)
        u = fisher.directions.double()[terms]
        if direction == "mean":
            own_u = torch.nn.functional.normalize(first.mean(0), dim=0)[None]
        else:
            own_u = torch.linalg.svd(first, full_matrices=False).Vh[:rank]
        torch.testing.assert_close((u * own_u).sum(1).abs(), torch.ones(rank, dtype=torch.float64), rtol=1e-8, atol=0)
        share = len(second) / 30
        projections = second @ u.T
        curvatures = projections.square().mean(0)
        torch.testing.assert_close(fisher.curvatures[terms], share * curvatures, rtol=1e-9, atol=0)
        torch.testing.assert_close(fisher.slopes[terms], share * projections.mean(0), rtol=1e-9, atol=1e-14)
        trace = float(second.square().sum(1).mean())
        assert part.num_samples == len(first) + len(second)
        assert part.share == share
        assert part.trace == pytest.approx(trace, rel=1e-9)
        assert part.rho == pytest.approx(float(curvatures.sum()) / trace, rel=1e-9)
        assert part.kappa == pytest.approx(float(first.mean(0) @ second.mean(0)) / trace, rel=1e-7)
        errors = projections.square().std(0) / math.sqrt(len(second))
        assert part.curvature_se == pytest.approx(errors.tolist(), rel=1e-7)
        expected_penalty += 0.5 * share * float(curvatures @ (u @ moved).square())

    first, second = gradients[:30], gradients[30:]
    trace = float(second.square().sum(1).mean())
    assert statistics.trace == pytest.approx(trace, rel=1e-9)
    assert statistics.rho == pytest.approx(float(fisher.curvatures.sum()) / trace, rel=1e-9)
    assert statistics.kappa == pytest.approx(float(first.mean(0) @ second.mean(0)) / trace, rel=1e-7)
    own = torch.stack(
        [
            (classes[30:] == s) * (second @ u).square()
            for s, u in zip(statistics.term_strata, fisher.directions.double(), strict=True)
        ]
    )
    assert statistics.curvature_se == pytest.approx((own.std(1) / math.sqrt(30)).tolist(), rel=1e-7)

    history = ck.LowRankHistory(model)
    history.append(fisher)
    with torch.no_grad():
        for p, part in zip(model.parameters(), split_by_parameter(moved, model), strict=True):
            p += part
    assert float(ck.rank1_ewc_penalty(history, lam=1.0).detach()) == pytest.approx(expected_penalty, rel=1e-8)


def _halves(gradients: Tensor, classes: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(gradients[:30], classes[:30]), (gradients[30:], classes[30:])]


def test_in_sample_strata_share_all_samples():
    model = Network().double()
    gradients = gradients_by_loop(model, 60)
    classes, batches = stratified()
    fisher = ck.estimate_fisher(model, loss_and_class, batches, unbiased=False)
    for stratum, u, curvature in zip(
        fisher.statistics.term_strata, fisher.directions.double(), fisher.curvatures, strict=True
    ):
        own = gradients[classes == stratum]
        mu = own.mean(0)
        torch.testing.assert_close(u, mu / mu.norm(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(curvature, (own @ u).square().sum() / 60, rtol=1e-8, atol=0)


def test_a_diagonal_is_the_same_with_strata():
    model = Network().double()
    _, batches = stratified()
    fisher = ck.estimate_fisher(model, loss_and_class, batches, kind="diagonal")
    plain = ck.estimate_fisher(model, lambda model, batch: loss(model, batch[:2]), batches, kind="diagonal")
    assert torch.equal(fisher.fisher_diagonal, plain.fisher_diagonal)


def test_strata_of_one_half_are_left_out_with_a_warning():
    model = Network().double()
    classes, _ = stratified()
    x, y = (part.double() for part in data(60))
    classes = torch.where(torch.arange(60) == 2, 11, classes)  # one sample of the first half
    classes[50] = 5  # and one of the second
    with pytest.warns(UserWarning, match="5 is only in the second half, 11 is only in the first half"):
        fisher = ck.estimate_fisher(model, loss_and_class, [(x, y, classes)])
    assert fisher.statistics.term_strata == (-1, 3, 8)
    assert sum(part.share for part in fisher.statistics.strata) == pytest.approx(29 / 30)
    trace = (
        gradients_by_loop(model, 60)[30:].square().sum(1).mean()
    )  # of all samples, so that rho shows what is missing
    assert fisher.statistics.trace == pytest.approx(float(trace), rel=1e-9)
    apart = torch.arange(60) // 30
    with (
        pytest.warns(UserWarning, match="0 is only in the first half, 1 is only in the second half"),
        pytest.raises(ValueError, match="no stratum has samples in both halves"),
    ):
        ck.estimate_fisher(model, loss_and_class, [(x, y, apart)])
    with pytest.raises(ValueError, match="rank is 4, but the first half of the data of stratum -1 has only 3 samples"):
        ck.estimate_fisher(model, loss_and_class, [(x, y, classes)], rank=4)
