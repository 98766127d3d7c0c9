"""Fisher estimation: against a loop over samples, on known gradients, and without changing the model."""

import contextlib
import math
import random

import numpy as np
import pytest
import torch
from helpers.fisher_problems import (
    IGNORE_ESTIMATE_WARNINGS,
    Linear,
    LossError,
    Network,
    data,
    global_state,
    gradients_by_loop,
    linear_loss,
    loader,
    loss,
    split_by_parameter,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import crl_kernels as ck

pytestmark = IGNORE_ESTIMATE_WARNINGS


def test_rank_1_equals_a_loop_over_samples():
    model = Network()
    gradients = gradients_by_loop(model)
    fisher = ck.estimate_fisher(model, loss, loader(batch_size=10))
    first, second = gradients[:25], gradients[25:]  # the third batch is cut in two
    mean = first.mean(0)
    u = mean / mean.norm()
    torch.testing.assert_close(fisher.directions.double()[0], u, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fisher.curvatures[0], (second @ u).square().mean(), rtol=1e-5, atol=0)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(fisher.anchor_projections[0], fisher.directions.double()[0] @ theta, rtol=1e-12, atol=0)
    statistics = fisher.statistics
    assert statistics.num_samples == 50
    trace = second.square().sum(1).mean()
    assert statistics.trace == pytest.approx(float(trace), rel=1e-5)
    assert statistics.rho == pytest.approx(float((second @ u).square().mean() / trace), rel=1e-5)
    assert statistics.kappa == pytest.approx(float(mean @ second.mean(0) / trace), rel=1e-4)


def test_diagonal_is_the_mean_of_squared_per_sample_gradients():
    """Not the square of the batch gradient, which a loader with large batches would make tiny."""
    model = Network()
    gradients = gradients_by_loop(model)
    expected = gradients.square().mean(0)
    for batch_size in (1, 8, 50):
        fisher = ck.estimate_fisher(model, loss, loader(batch_size=batch_size), kind="diagonal")
        torch.testing.assert_close(fisher.fisher_diagonal.double(), expected, rtol=1e-4, atol=1e-8)
    wrong = gradients.mean(0).square().sum()
    assert float(wrong) < 0.5 * float(expected.sum())


def double_batches(count: int = 50, batch_size: int = 25) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double()) for x, y in loader(count, batch_size)]


@pytest.mark.parametrize("rank", [1, 3])
def test_top_directions_of_one_batch_equal_a_singular_value_decomposition(rank):
    model = Network().double()
    gradients = gradients_by_loop(model)
    fisher = ck.estimate_fisher(model, loss, double_batches(), rank=rank, direction="top")
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    overlap = (fisher.directions.double() @ rows[:rank].T).abs()
    torch.testing.assert_close(overlap, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    held_out = gradients[25:] @ rows[:rank].T
    torch.testing.assert_close(fisher.curvatures, held_out.square().mean(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(fisher.slopes.abs(), held_out.mean(0).abs(), rtol=1e-8, atol=1e-12)
    assert fisher.statistics.kappa == pytest.approx(
        float(gradients[:25].mean(0) @ gradients[25:].mean(0) / gradients[25:].square().sum(1).mean()), rel=1e-8
    )
    # The same data as the second half, too, makes the curvatures eigenvalues; so does the in-sample estimate.
    in_sample = ck.estimate_fisher(
        model, loss, double_batches(batch_size=50), rank=rank, direction="top", unbiased=False
    )
    eigenvalues = torch.linalg.svdvals(gradients)[:rank].square() / 50
    torch.testing.assert_close(in_sample.curvatures, eigenvalues, rtol=1e-8, atol=0)


def test_the_penalty_is_the_dense_quadratic_form():
    model = Network().double()
    gradients = gradients_by_loop(model)
    fisher = ck.estimate_fisher(model, loss, double_batches(), rank=3)
    history = ck.LowRankHistory(model)
    history.append(fisher)
    anchor = torch.cat([p.detach().flatten() for p in model.parameters()])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - anchor
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    u = rows[:3]
    dense = u.T @ torch.diag((gradients[25:] @ u.T).square().mean(0)) @ u
    penalty = ck.rank1_ewc_penalty(history, lam=7.0)
    torch.testing.assert_close(penalty.detach().double(), 3.5 * moved @ dense @ moved, rtol=1e-8, atol=0)


def test_directions_merged_over_batches_hold_almost_all_that_the_best_ones_do():
    model = Network()
    gradients = gradients_by_loop(model, 200)
    fisher = ck.estimate_fisher(model, loss, loader(200, batch_size=10), rank=3)
    first = gradients[:100]
    best = torch.linalg.svdvals(first)[:3].square().sum()
    assert float((first @ fisher.directions.double().T).square().sum() / best) > 0.999


def test_the_error_of_merging_is_that_of_the_docstring():
    """Eigenvalues 1/j in 200 dimensions, where no sketch of few rows holds F: batches of 32, 25 in the first half."""
    generator = torch.Generator().manual_seed(6)
    spread = torch.arange(1, 201, dtype=torch.float64).rsqrt()
    x = torch.randn(1600, 200, generator=generator, dtype=torch.float64) * spread
    first = x[:800]
    for rank in (1, 3):
        u = ck.estimate_fisher(Linear(200), linear_loss, x.split(32), rank=rank, direction="top").directions
        best = torch.linalg.svdvals(first)[:rank].square().sum()
        held = float((first @ u.T).square().sum() / best)
        assert 0.9998 < held <= 1 + 1e-12
        torch.testing.assert_close(u @ u.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_fisher_of_known_rank_1_is_recovered():
    v = torch.nn.functional.normalize(torch.arange(1.0, 21.0, dtype=torch.float64), dim=0)
    scales = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    for direction in ("mean", "top"):
        fisher = ck.estimate_fisher(Linear(), linear_loss, (scales[:, None] * v).split(50), direction=direction)
        u = fisher.directions[0]
        torch.testing.assert_close(u * (u @ v).sign(), v, rtol=1e-12, atol=0)
        torch.testing.assert_close(fisher.curvatures[0], scales[200:].square().mean(), rtol=1e-12, atol=0)
        assert fisher.statistics.rho == pytest.approx(1.0, abs=1e-12)
        assert fisher.statistics.rho_se == pytest.approx(0.0, abs=1e-12)


def test_where_the_mean_vanishes_the_top_direction_holds_the_trace():
    """Gradients along one line, on both sides of it: an optimum."""
    generator = torch.Generator().manual_seed(4)
    signs = torch.randint(2, (400, 1), generator=generator, dtype=torch.float64) * 2 - 1
    v = torch.nn.functional.normalize(torch.ones(20, dtype=torch.float64), dim=0)
    x = 3 * signs * v + 0.3 * torch.randn(400, 20, generator=generator, dtype=torch.float64)
    fisher = ck.estimate_fisher(Linear(), linear_loss, x.split(40), direction="top")
    assert float((fisher.directions[0] @ v).abs()) > 0.999
    assert fisher.statistics.rho > 0.8
    assert abs(fisher.statistics.kappa) < 0.02


def test_curvature_is_held_out():
    """Pure noise, N < P: the samples that gave the direction find it steep, fresh ones do not."""
    noise = torch.randn(64, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.warns(ck.FisherWarning, match="of the trace of the Fisher lies along the mean gradient") as warned:
        fisher = ck.estimate_fisher(Linear(60), linear_loss, noise.split(16))
    assert {record.message.kind for record in warned} == {"rho", "signal_share"}
    assert any("crl_kernels.diagnose compares forms that may hold more" in str(record.message) for record in warned)
    u = fisher.directions.double()[0]
    in_sample, held_out = ((half @ u).square().mean() for half in (noise[:32], noise[32:]))
    torch.testing.assert_close(fisher.curvatures[0], held_out, rtol=1e-12, atol=0)
    assert float(in_sample) > 2 * float(held_out)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*data(24), strict=True))


def test_halves_are_halves_of_the_samples():
    model = Network()
    gradients = gradients_by_loop(model, 17)
    for batches in (loader(17, 16), list(loader(17, 16)), [data(17)]):
        fisher = ck.estimate_fisher(model, loss, batches)
        u = gradients[:8].mean(0)
        torch.testing.assert_close(fisher.directions.double()[0], u / u.norm(), rtol=1e-3, atol=1e-5)


def test_samples_are_counted_and_limited():
    model = Network()
    assert ck.estimate_fisher(model, loss, loader(50, 8), max_samples=21).statistics.num_samples == 21
    endless = iter(lambda: data(8), None)  # no len
    assert ck.estimate_fisher(model, loss, endless, max_samples=20).statistics.num_samples == 20
    stream = DataLoader(Stream(), batch_size=8)  # has __len__, which raises
    assert ck.estimate_fisher(model, loss, stream, max_samples=20).statistics.num_samples == 20
    with pytest.raises(ValueError, match="loader has no len"):
        ck.estimate_fisher(model, loss, stream)
    with pytest.raises(ValueError, match="loader has no len"):
        ck.estimate_fisher(model, loss, iter(lambda: data(8), None))


def test_batches_may_be_dicts():
    model = Network()
    x, y = data()
    batches = [{"x": x[i : i + 10], "y": y[i : i + 10], "note": "not a tensor"} for i in range(0, 50, 10)]
    fisher = ck.estimate_fisher(model, lambda model, batch: loss(model, (batch["x"], batch["y"])), batches)
    assert torch.equal(fisher.directions, ck.estimate_fisher(model, loss, loader(50, 10)).directions)


def test_the_loss_is_called_once_a_batch_on_all_its_samples():
    """So it may do what it likes: look at values, call .item(). Before, of a loss that was not met before, the first
    batch is looked at with samples exchanged."""
    model = Network()
    sizes = []

    def stubborn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = loss(model, batch)
        sizes.append(len(losses))
        return losses * (1.0 if losses[0].item() > 0 else 2.0)

    for options in ({}, {"kind": "diagonal"}, {"rank": 2}):
        expected = ck.estimate_fisher(model, loss, loader(), **options)
        sizes.clear()
        fisher = ck.estimate_fisher(model, stubborn, loader(), **options)
        exchanged = 0 if options else 1 + 2 * 3
        assert sum(sizes) == 50 + 8 * exchanged
        assert sizes[: exchanged + 3] == [8] * (exchanged + 3)
        assert str(fisher.statistics) == str(expected.statistics)


def test_noise_of_the_loss_follows_the_generator():
    model = Network()

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    def estimate(seed: int) -> Tensor:
        return ck.estimate_fisher(model, noisy, loader(), generator=torch.Generator().manual_seed(seed)).directions

    assert torch.equal(estimate(1), estimate(1))
    assert not torch.equal(estimate(1), estimate(2))


@pytest.mark.parametrize("options", [{}, {"kind": "diagonal"}, {"rank": 2}, {"unbiased": False}])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(options, fails):
    model = Network()
    model.layers[1].eval()  # a mixed mode
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.unused.grad = None
    calls = 0

    def disturbing_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        model.layers[1].num_batches_tracked.add_(1)
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        losses = loss(model, batch)
        if fails and calls == 3:
            raise LossError
        assert not any(module.training for module in model.modules())
        return losses, torch.arange(len(losses)) % 2

    before = global_state(model)
    identities = [id(p.grad) for p in model.parameters()]
    with pytest.raises(LossError) if fails else contextlib.nullcontext():
        ck.estimate_fisher(model, disturbing_loss, loader(), **options)
    assert calls >= 3
    torch.testing.assert_close(global_state(model), before, rtol=0, atol=0)
    assert [id(p.grad) for p in model.parameters()] == identities


@pytest.mark.parametrize("options", [{}, {"direction": "top"}, {"kind": "diagonal"}])
@pytest.mark.parametrize("accumulated", [False, True], ids=["of a gradient", "of an accumulated gradient"])
def test_hooks_that_change_gradients_are_not_called_and_stay(options, accumulated):
    """They would be for the sum of a batch, and not for single samples."""
    fisher = ck.estimate_fisher(Network(), loss, loader(), **options)
    model = Network()
    calls: list[None] = []
    used = list(model.layers.parameters())

    def clear(parameter: torch.Tensor) -> None:
        calls.append(None)
        parameter.grad.zero_()

    if accumulated:
        handles = [p.register_post_accumulate_grad_hook(clear) for p in used]
    else:
        handles = [p.register_hook(lambda gradient: calls.append(None) or 0 * gradient) for p in used]
    again = ck.estimate_fisher(model, loss, loader(), **options)
    name = "fisher_diagonal" if options.get("kind") == "diagonal" else "directions"
    assert torch.equal(getattr(fisher, name), getattr(again, name))
    assert not calls
    for removed in (False, True):
        calls.clear()
        model.zero_grad()
        loss(model, data()).sum().backward()
        assert len(calls) == (0 if removed else len(handles))
        assert all(bool(p.grad.any()) == removed for p in used)
        for handle in handles:
            handle.remove()


def test_existing_gradients_do_not_enter():
    fisher = ck.estimate_fisher(Network(), loss, loader(), rank=2)
    model = Network()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    again = ck.estimate_fisher(model, loss, loader(), rank=2)
    assert torch.equal(fisher.directions, again.directions)
    assert torch.equal(fisher.curvatures, again.curvatures)


def test_storage_dtypes_and_selection():
    model = Network()
    assert ck.estimate_fisher(model, loss, loader(), storage_dtype=torch.bfloat16).directions.dtype == torch.bfloat16
    fisher = ck.estimate_fisher(model, loss, loader(), exclude=["unused", "layers.1"])
    history = ck.LowRankHistory(model, exclude=["unused", "layers.1"])
    history.append(fisher)
    assert float(history.drift().abs()) < 1e-12
    assert ck.estimate_fisher(Network().double(), loss, double_batches()).directions.dtype == torch.float64


@pytest.mark.parametrize("rank", [1, 2])
def test_curvatures_slopes_and_anchors_fit_the_stored_direction(rank):
    model = Network().double()
    second = gradients_by_loop(model)[25:]
    fisher = ck.estimate_fisher(model, loss, double_batches(), rank=rank, storage_dtype=torch.bfloat16)
    stored = fisher.directions.double()
    exact = ck.estimate_fisher(model, loss, double_batches(), rank=rank).directions.double()
    assert float((stored - exact).abs().max()) > 1e-4
    projections = second @ stored.T
    torch.testing.assert_close(fisher.curvatures, projections.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher.slopes, projections.mean(0), rtol=1e-10, atol=1e-14)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(fisher.anchor_projections, stored @ theta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"kind": "diagonal"}])
def test_models_in_bfloat16_have_float32_statistics(options):
    model = Network().bfloat16()
    gradients = gradients_by_loop(model)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in loader(batch_size=25)]
    fisher = ck.estimate_fisher(model, loss, batches, **options)
    if options.get("kind") == "diagonal":
        assert fisher.fisher_diagonal.dtype == torch.float32
        expected = gradients.square().mean(0)
        # Gradients are rounded to 2^-9 and the squares of several samples to twice that.
        assert float((fisher.fisher_diagonal.double() - expected).norm() / expected.norm()) < 2**-6
        return
    assert fisher.directions.dtype == torch.float32
    expected = (gradients[25:] @ fisher.directions.double().T).square().mean(0)
    torch.testing.assert_close(fisher.curvatures, expected, rtol=2**-6, atol=0)
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    expected = rows[:2] if "rank" in options else torch.nn.functional.normalize(gradients[:25].mean(0), dim=0)[None]
    assert bool(((fisher.directions.double() * expected).sum(1).abs() > 0.999).all())


def test_unbiased_false_equals_the_papers_two_passes():
    """A shuffled loader and a loss that draws noise: both passes must see the same samples with the same noise."""
    model = Network()
    seen: list[tuple[Tensor, Tensor]] = []

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch[0] + torch.randn_like(batch[0]), batch[1]
        seen.append((x, y))
        return loss(model, (x, y))

    for generator in (None, torch.Generator().manual_seed(3)):
        seen.clear()
        shuffled = DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True, generator=generator)
        fisher = ck.estimate_fisher(
            model, noisy, shuffled, unbiased=False, max_samples=45, generator=torch.Generator().manual_seed(1)
        )
        first, second = (tuple(map(torch.cat, zip(*half, strict=True))) for half in (seen[-12:-6], seen[-6:]))
        assert torch.equal(first[0], second[0])
        assert len(first[0]) == 45

        gradients = gradients_by_loop(model, 45, first)  # the paper's: batch size 1, twice
        mu = torch.zeros(gradients.shape[1], dtype=torch.float64)
        for g in gradients:
            mu += g / 45
        c = sum((mu / mu.norm() @ g).square() / 45 for g in gradients) / mu.norm().square()
        named = dict(zip((n for n, _ in model.named_parameters()), split_by_parameter(mu, model), strict=True))
        paper = ck.LowRankFisher.from_mean_gradient(named, c, dict(model.named_parameters()))
        torch.testing.assert_close(fisher.directions.double(), paper.directions.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fisher.curvatures, paper.curvatures, rtol=1e-5, atol=0)
        torch.testing.assert_close(fisher.slopes, paper.slopes, rtol=1e-5, atol=0)
        statistics = fisher.statistics
        trace = gradients.square().sum(1).mean()
        assert statistics.num_samples == 45
        assert statistics.trace == pytest.approx(float(trace), rel=1e-5)
        assert statistics.rho == pytest.approx(float(c * mu.square().sum() / trace), rel=1e-5)
        gram = gradients @ gradients.T
        unbiased = (gram.sum() - gram.trace()) / (45 * 44)
        assert statistics.mean_gradient_sq_norm == pytest.approx(float(unbiased), rel=1e-4)
        assert all(math.isnan(e) for e in (*statistics.curvature_se, statistics.rho_se, statistics.kappa_se))


def test_passes_that_see_different_data_are_noticed():
    generator = torch.Generator().manual_seed(0)  # a source of random numbers that nothing can rewind

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]))

    with pytest.raises(ValueError, match="other samples or noise in the second pass of unbiased=False"):
        ck.estimate_fisher(Network(), noisy, loader(), unbiased=False)
    with pytest.raises(ValueError, match="loader can be read only once"):
        ck.estimate_fisher(Network(), loss, iter(loader()), unbiased=False)


def test_progress_is_shown_on_stderr(capsys):
    ck.estimate_fisher(Network(), loss, loader(), progress=True)
    lines = [
        line.rpartition("\r")[2] for line in capsys.readouterr().err.rstrip("\n").split("\n")
    ]  # as a terminal shows
    assert [line.split(" samples")[0] for line in lines] == ["Fisher, directions: 25", "Fisher, curvatures: 25"]
    ck.estimate_fisher(Network(), loss, loader())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "full"}, "kind is 'full'; expected 'low_rank' or 'diagonal'"),
        ({"rank": 0}, "rank is 0; expected an integer >= 1"),
        ({"rank": 40}, "rank is 40, but the first half of the data has only 25 samples"),
        ({"direction": "last"}, "direction is 'last'; expected 'mean' or 'top'"),
        ({"direction": "mean", "rank": 2}, "direction='mean' is one direction, and rank is 2; use direction='top'"),
        ({"kind": "diagonal", "rank": 2}, "belong to kind='low_rank'"),
        ({"kind": "diagonal", "direction": "top"}, "belong to kind='low_rank'"),
        ({"kind": "diagonal", "unbiased": False}, "belong to kind='low_rank'"),
        ({"process_group": object()}, "process_group is given, but torch.distributed is not initialised"),
        ({"max_samples": 1}, "max_samples is 1; expected an integer >= 2"),
        ({"loader": []}, "loader yields no samples"),
        ({"loader": [], "kind": "diagonal"}, "loader yields no samples"),
        ({"loader": [], "unbiased": False}, "loader yields no samples"),
        ({"loader": [data(1)]}, "loader yields one sample"),
        ({"loader": iter([data(8)]), "max_samples": 20}, "loader ended after 8 samples, before the second half began"),
        ({"loader": [(torch.zeros(3, 6), torch.zeros(2, 3))]}, "no common first dimension"),
        ({"per_sample_loss": lambda m, b: loss(m, b).mean()}, r"returned shape \(\) for a batch of"),
        ({"per_sample_loss": lambda m, b: loss(m, b)[:, None]}, r"returned shape \(\d+, 1\) for a batch of"),
        ({"per_sample_loss": lambda m, b: loss(m, b)[:, None], "kind": "diagonal"}, r"returned shape \(8, 1\)"),
        ({"per_sample_loss": lambda m, b: loss(m, b).mean(), "rank": 2}, r"returned shape \(\) for a batch of"),
        ({"per_sample_loss": lambda m, b: [loss(m, b)]}, "returned a list for a batch of 8"),
        ({"per_sample_loss": torch.no_grad()(loss)}, "carries no gradient"),
        ({"per_sample_loss": torch.no_grad()(loss), "kind": "diagonal"}, "carries no gradient"),
        ({"per_sample_loss": lambda m, b: loss(m, b) * float("nan")}, "NaN or infinite"),
        ({"per_sample_loss": lambda m, b: loss(m, b) * float("nan"), "kind": "diagonal"}, "NaN or infinite"),
        ({"per_sample_loss": lambda m, b: loss(m, b) * float("nan"), "rank": 2}, "NaN or infinite"),
        ({"per_sample_loss": lambda m, b: 0 * loss(m, b)}, "mean gradient .* is zero"),
        ({"per_sample_loss": lambda m, b: 0 * loss(m, b), "rank": 2}, "span fewer than 2 directions"),
        ({"per_sample_loss": lambda m, b: 0 * loss(m, b), "kind": "diagonal"}, "every per-sample gradient is zero"),
        ({"per_sample_loss": lambda m, b: (loss(m, b), 3)}, "returned strata of a int for a batch of 8"),
        ({"per_sample_loss": lambda m, b: (loss(m, b), torch.zeros(2).long())}, r"strata of shape \(2,\) for a batch"),
        ({"per_sample_loss": lambda m, b: (loss(m, b), b[0][:, 0])}, "strata of torch.float32; expected integers"),
        ({"per_sample_loss": lambda m, b: (loss(m, b), b[0][:, 0] > 0)}, "strata of torch.bool; expected integers"),
        (
            {"per_sample_loss": lambda m, b: loss(m, b) if len(b[0]) < 8 else (loss(m, b), torch.zeros(8).long())},
            "strata for some batches and none for others",
        ),
    ],
)
def test_bad_input_gives_one_clear_error(change, message):
    arguments = {"per_sample_loss": loss, "loader": loader()} | change
    with pytest.raises((TypeError, ValueError), match=message):
        ck.estimate_fisher(Network(), arguments.pop("per_sample_loss"), arguments.pop("loader"), **arguments)
