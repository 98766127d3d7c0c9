"""Fisher estimation: against a loop over samples, on gradients that are known, and leaving everything as it was."""

import math
import random
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import crl_kernels as ck
from crl_kernels import files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean(1)


def data(count: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator) + 1


def loader(count: int = 50, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*data(count)), batch_size=batch_size)


def loop_gradients(model: nn.Module, count: int = 50, samples: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(N, P) float64: one backward pass per sample."""
    model.eval()
    x, y = data(count) if samples is None else samples
    x, y = x.to(model.unused.dtype), y.to(model.unused.dtype)
    params = list(model.parameters())
    rows = []
    for i in range(count):
        gradients = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])).sum(), params, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, params, strict=True)]
            )
        )
    model.train()
    return torch.stack(rows).double()


@pytest.fixture(autouse=True)
def quiet():
    """Small random problems are neither rank 1 nor free of noise; the warnings about it have tests of their own."""
    warnings.filterwarnings("ignore", message="only .* of the trace")
    warnings.filterwarnings("ignore", message="the mean gradient.* is mostly noise")


def flat(fisher: ck.LowRankFisher) -> Tensor:
    return fisher.directions.double()


def test_rank_1_equals_a_loop_over_samples():
    model = Net()
    gradients = loop_gradients(model)
    fisher = ck.estimate_fisher(model, loss, loader(batch_size=10))
    first, second = gradients[:25], gradients[25:]  # the third batch is cut in two
    mean = first.mean(0)
    u = mean / mean.norm()
    torch.testing.assert_close(flat(fisher)[0], u, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fisher.curvatures[0], (second @ u).square().mean(), rtol=1e-5, atol=0)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(fisher.anchor_projections[0], flat(fisher)[0] @ theta, rtol=1e-12, atol=0)
    statistics = fisher.statistics
    assert statistics.num_samples == 50
    trace = second.square().sum(1).mean()
    assert statistics.trace == pytest.approx(float(trace), rel=1e-5)
    assert statistics.rho == pytest.approx(float((second @ u).square().mean() / trace), rel=1e-5)
    assert statistics.kappa == pytest.approx(float(mean @ second.mean(0) / trace), rel=1e-4)


def test_diagonal_is_the_mean_of_squared_per_sample_gradients():
    """Not the square of the batch gradient, which a loader with large batches would make tiny."""
    model = Net()
    gradients = loop_gradients(model)
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
    model = Net().double()
    gradients = loop_gradients(model)
    fisher = ck.estimate_fisher(model, loss, double_batches(), rank=rank, direction="top")
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    overlap = (flat(fisher) @ rows[:rank].T).abs()
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
    model = Net().double()
    gradients = loop_gradients(model)
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
    model = Net()
    gradients = loop_gradients(model, 200)
    fisher = ck.estimate_fisher(model, loss, loader(200, batch_size=10), rank=3)
    first = gradients[:100]
    best = torch.linalg.svdvals(first)[:3].square().sum()
    assert float((first @ flat(fisher).T).square().sum() / best) > 0.999


def test_the_error_of_merging_is_what_the_docstring_says():
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


class Linear(nn.Module):
    """loss_i = x_i . theta, so x_i is the gradient of sample i."""

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.theta = nn.Linear(count, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta(x)


def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, 0]


def test_a_fisher_of_known_rank_1_is_found():
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
    with pytest.warns(UserWarning, match="of the trace of the Fisher lies along the mean gradient"):
        fisher = ck.estimate_fisher(Linear(60), linear_loss, noise.split(16))
    u = flat(fisher)[0]
    in_sample, held_out = ((half @ u).square().mean() for half in (noise[:32], noise[32:]))
    torch.testing.assert_close(fisher.curvatures[0], held_out, rtol=1e-12, atol=0)
    assert float(in_sample) > 2 * float(held_out)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*data(24), strict=True))


def test_halves_are_halves_of_the_samples():
    model = Net()
    gradients = loop_gradients(model, 17)
    for batches in (loader(17, 16), list(loader(17, 16)), [data(17)]):
        fisher = ck.estimate_fisher(model, loss, batches)
        u = gradients[:8].mean(0)
        torch.testing.assert_close(flat(fisher)[0], u / u.norm(), rtol=1e-3, atol=1e-5)


def test_samples_are_counted_and_limited():
    model = Net()
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
    model = Net()
    x, y = data()
    batches = [{"x": x[i : i + 10], "y": y[i : i + 10], "note": "not a tensor"} for i in range(0, 50, 10)]
    fisher = ck.estimate_fisher(model, lambda model, batch: loss(model, (batch["x"], batch["y"])), batches)
    assert torch.equal(fisher.directions, ck.estimate_fisher(model, loss, loader(50, 10)).directions)


def test_the_loss_is_called_once_a_batch_on_the_whole_batch():
    """So it may do what it likes: look at values, call .item(). Before, of a loss that was not met before, the first
    batch is looked at with samples exchanged."""
    model = Net()
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
    model = Net()

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    def estimate(seed: int) -> Tensor:
        return ck.estimate_fisher(model, noisy, loader(), generator=torch.Generator().manual_seed(seed)).directions

    assert torch.equal(estimate(1), estimate(1))
    assert not torch.equal(estimate(1), estimate(2))


class Broken(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"kind": "diagonal"}, {"rank": 2}, {"unbiased": False}])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(options, fails):
    model = Net()
    model.layers[1].eval()  # a mixed mode
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.unused.grad = None
    calls = 0

    def meddling(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        model.layers[1].num_batches_tracked.add_(1)
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        losses = loss(model, batch)
        if fails and calls == 3:
            raise Broken
        assert not any(module.training for module in model.modules())
        return losses, torch.arange(len(losses)) % 2

    def state() -> list:
        return [
            [module.training for module in model.modules()],
            {name: value.clone() for name, value in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
            torch.tensor(random.getstate()[1]),
            torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
        ]

    before = state()
    identities = [id(p.grad) for p in model.parameters()]
    if fails:
        with pytest.raises(Broken):
            ck.estimate_fisher(model, meddling, loader(), **options)
    else:
        ck.estimate_fisher(model, meddling, loader(), **options)
    assert calls >= 3
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert [id(p.grad) for p in model.parameters()] == identities


@pytest.mark.parametrize("options", [{}, {"direction": "top"}])
def test_hooks_that_change_gradients_are_not_called_and_stay(options):
    """They would be for the sum of a batch, and not for single samples."""
    fisher = ck.estimate_fisher(Net(), loss, loader(), **options)
    model = Net()
    calls: list[None] = []
    used = list(model.layers.parameters())
    handles = [p.register_hook(lambda gradient: calls.append(None) or 0 * gradient) for p in used]
    again = ck.estimate_fisher(model, loss, loader(), **options)
    assert torch.equal(fisher.directions, again.directions)
    assert not calls
    for removed in (False, True):
        calls.clear()
        model.zero_grad()
        loss(model, data()).sum().backward()
        assert len(calls) == (0 if removed else len(handles))
        assert all(bool(p.grad.any()) == removed for p in used)
        for handle in handles:
            handle.remove()


def test_gradients_that_were_there_do_not_enter():
    fisher = ck.estimate_fisher(Net(), loss, loader(), rank=2)
    model = Net()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    again = ck.estimate_fisher(model, loss, loader(), rank=2)
    assert torch.equal(fisher.directions, again.directions)
    assert torch.equal(fisher.curvatures, again.curvatures)


def test_storage_dtypes_and_selection():
    model = Net()
    assert ck.estimate_fisher(model, loss, loader(), storage_dtype=torch.bfloat16).directions.dtype == torch.bfloat16
    fisher = ck.estimate_fisher(model, loss, loader(), exclude=["unused", "layers.1"])
    history = ck.LowRankHistory(model, exclude=["unused", "layers.1"])
    history.append(fisher)
    assert float(history.drift().abs()) < 1e-12
    assert ck.estimate_fisher(Net().double(), loss, double_batches()).directions.dtype == torch.float64


@pytest.mark.parametrize("rank", [1, 2])
def test_curvatures_slopes_and_anchors_fit_the_stored_direction(rank):
    model = Net().double()
    second = loop_gradients(model)[25:]
    fisher = ck.estimate_fisher(model, loss, double_batches(), rank=rank, storage_dtype=torch.bfloat16)
    stored = flat(fisher)
    exact = flat(ck.estimate_fisher(model, loss, double_batches(), rank=rank))
    assert float((stored - exact).abs().max()) > 1e-4
    projections = second @ stored.T
    torch.testing.assert_close(fisher.curvatures, projections.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher.slopes, projections.mean(0), rtol=1e-10, atol=1e-14)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(fisher.anchor_projections, stored @ theta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"kind": "diagonal"}])
def test_models_in_bfloat16_have_float32_statistics(options):
    model = Net().bfloat16()
    gradients = loop_gradients(model)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in loader(batch_size=25)]
    fisher = ck.estimate_fisher(model, loss, batches, **options)
    if options.get("kind") == "diagonal":
        assert fisher.fisher_diagonal.dtype == torch.float32
        expected = gradients.square().mean(0)
        # Gradients are rounded to 2^-9 and the squares of several samples to twice that.
        assert float((fisher.fisher_diagonal.double() - expected).norm() / expected.norm()) < 2**-6
        return
    assert fisher.directions.dtype == torch.float32
    expected = (gradients[25:] @ flat(fisher).T).square().mean(0)
    torch.testing.assert_close(fisher.curvatures, expected, rtol=2**-6, atol=0)
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    found = rows[:2] if "rank" in options else torch.nn.functional.normalize(gradients[:25].mean(0), dim=0)[None]
    assert bool(((flat(fisher) * found).sum(1).abs() > 0.999).all())


# In-sample, as the paper's code does it


def test_unbiased_false_equals_the_papers_two_passes():
    """A shuffled loader and a loss that draws noise: both passes must see the same samples with the same noise."""
    model = Net()
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

        gradients = loop_gradients(model, 45, first)  # the paper's: batch size 1, twice
        mu = torch.zeros(gradients.shape[1], dtype=torch.float64)
        for g in gradients:
            mu += g / 45
        c = sum((mu / mu.norm() @ g).square() / 45 for g in gradients) / mu.norm().square()
        named = dict(zip((n for n, _ in model.named_parameters()), _split(mu, model), strict=True))
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


def _split(vector: Tensor, model: nn.Module) -> list[Tensor]:
    params = list(model.parameters())
    return [part.reshape(p.shape) for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]


def test_passes_that_see_different_data_are_noticed():
    generator = torch.Generator().manual_seed(0)  # a source of random numbers that nothing can rewind

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]))

    with pytest.raises(ValueError, match="other samples or noise in the second pass of unbiased=False"):
        ck.estimate_fisher(Net(), noisy, loader(), unbiased=False)
    with pytest.raises(ValueError, match="loader can be read only once"):
        ck.estimate_fisher(Net(), loss, iter(loader()), unbiased=False)


# Strata


def by_class(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return loss(model, batch[:2]), batch[2]


def stratified(count: int = 60, batch_size: int = 7) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Strata -1, 3 and 8, unevenly."""
    x, y = (part.double() for part in data(count))
    which = torch.tensor([8, 3, 3, -1, 8, 8, 3, 8])[torch.arange(count) * 5 % 8]
    return which, list(zip(x.split(batch_size), y.split(batch_size), which.split(batch_size), strict=True))


@pytest.mark.parametrize(("rank", "direction"), [(1, "mean"), (1, "top"), (2, "top")])
def test_strata_against_a_written_out_computation(rank, direction):
    model = Net().double()
    gradients = loop_gradients(model, 60)
    # One batch a half for "top", which is exact within a batch.
    which, batches = stratified(batch_size=7 if direction == "mean" else 30)
    fisher = ck.estimate_fisher(model, by_class, batches, rank=rank, direction=direction)
    assert len(fisher) == 3 * rank
    statistics = fisher.statistics
    assert [part.stratum for part in statistics.strata] == [-1, 3, 8]
    assert statistics.term_strata == tuple(s for s in (-1, 3, 8) for _ in range(rank))

    moved = torch.randn(gradients.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected_penalty = 0.0
    for i, (stratum, part) in enumerate(zip((-1, 3, 8), statistics.strata, strict=True)):
        first, second = (half[which_half == stratum] for half, which_half in _halves(gradients, which))
        terms = slice(i * rank, (i + 1) * rank)
        u = flat(fisher)[terms]
        if direction == "mean":
            found = torch.nn.functional.normalize(first.mean(0), dim=0)[None]
        else:
            found = torch.linalg.svd(first, full_matrices=False).Vh[:rank]
        torch.testing.assert_close((u * found).sum(1).abs(), torch.ones(rank, dtype=torch.float64), rtol=1e-8, atol=0)
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
        [(which[30:] == s) * (second @ u).square() for s, u in zip(statistics.term_strata, flat(fisher), strict=True)]
    )
    assert statistics.curvature_se == pytest.approx((own.std(1) / math.sqrt(30)).tolist(), rel=1e-7)

    history = ck.LowRankHistory(model)
    history.append(fisher)
    with torch.no_grad():
        for p, part in zip(model.parameters(), _split(moved, model), strict=True):
            p += part
    assert float(ck.rank1_ewc_penalty(history, lam=1.0).detach()) == pytest.approx(expected_penalty, rel=1e-8)


def _halves(gradients: Tensor, which: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(gradients[:30], which[:30]), (gradients[30:], which[30:])]


def test_in_sample_strata_share_all_samples():
    model = Net().double()
    gradients = loop_gradients(model, 60)
    which, batches = stratified()
    fisher = ck.estimate_fisher(model, by_class, batches, unbiased=False)
    for stratum, u, curvature in zip(fisher.statistics.term_strata, flat(fisher), fisher.curvatures, strict=True):
        own = gradients[which == stratum]
        mu = own.mean(0)
        torch.testing.assert_close(u, mu / mu.norm(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(curvature, (own @ u).square().sum() / 60, rtol=1e-8, atol=0)


def test_a_diagonal_is_the_same_with_strata():
    model = Net().double()
    _, batches = stratified()
    fisher = ck.estimate_fisher(model, by_class, batches, kind="diagonal")
    plain = ck.estimate_fisher(model, lambda model, batch: loss(model, batch[:2]), batches, kind="diagonal")
    assert torch.equal(fisher.fisher_diagonal, plain.fisher_diagonal)


def test_strata_of_one_half_are_left_out_with_a_warning():
    model = Net().double()
    which, _ = stratified()
    x, y = (part.double() for part in data(60))
    which = torch.where(torch.arange(60) == 2, 11, which)  # one sample of the first half
    which[50] = 5  # and one of the second
    with pytest.warns(UserWarning, match="5 is only in the second half, 11 is only in the first half"):
        fisher = ck.estimate_fisher(model, by_class, [(x, y, which)])
    assert fisher.statistics.term_strata == (-1, 3, 8)
    assert sum(part.share for part in fisher.statistics.strata) == pytest.approx(29 / 30)
    trace = loop_gradients(model, 60)[30:].square().sum(1).mean()  # of all samples, so that rho shows what is missing
    assert fisher.statistics.trace == pytest.approx(float(trace), rel=1e-9)
    apart = torch.arange(60) // 30
    with (
        pytest.warns(UserWarning, match="0 is only in the first half, 1 is only in the second half"),
        pytest.raises(ValueError, match="no stratum has samples in both halves"),
    ):
        ck.estimate_fisher(model, by_class, [(x, y, apart)])
    with pytest.raises(ValueError, match="rank is 4, but the first half of the data of stratum -1 has only 3 samples"):
        ck.estimate_fisher(model, by_class, [(x, y, which)], rank=4)


# Statistics, against simulations whose truth is known


def accepted(repetitions: int, probability: float = 0.95, level: float = 1e-3) -> tuple[float, float]:
    """The shares of hits, out of so many repetitions, that a coverage of ``probability`` gives, except with ``level``
    on either side."""
    log_odds = [
        math.lgamma(repetitions + 1) - math.lgamma(k + 1) - math.lgamma(repetitions - k + 1)
        + k * math.log(probability) + (repetitions - k) * math.log1p(-probability)
        for k in range(repetitions + 1)
    ]  # fmt: skip
    cumulative = np.cumsum(np.exp(log_odds))
    low, high = np.searchsorted(cumulative, [level, 1 - level])
    return low / repetitions, high / repetitions


class Simulation:
    """Gradients mu + spread * noise in P dimensions, and what is true of them."""

    def __init__(self, mu: Tensor, spread: Tensor, seed: int) -> None:
        self.mu, self.spread = mu, spread
        self.generator = torch.Generator().manual_seed(seed)
        self.fisher = torch.diag(spread.square()) + torch.outer(mu, mu)
        self.trace = float(self.fisher.trace())
        self.kappa = float(mu.square().sum()) / self.trace

    def draw(self, count: int) -> Tensor:
        noise = torch.randn(count, len(self.mu), generator=self.generator, dtype=torch.float64)
        return self.mu + noise * self.spread

    def curvature(self, fisher: ck.LowRankFisher) -> Tensor:
        return ((fisher.directions @ self.fisher) * fisher.directions).sum(1)


@pytest.mark.parametrize(("size", "direction"), [(3.0, "mean"), (0.3, "mean"), (0.5, "top")])
def test_intervals_cover_the_truth(size, direction):
    """From a mean that is clear (signal share above 0.99) to one that is about half noise."""
    dims, count = 30, 1000
    repetitions = 250 if direction == "mean" else 150
    mu = torch.nn.functional.normalize(torch.arange(1.0, dims + 1, dtype=torch.float64), dim=0) * size
    truth = Simulation(mu, torch.linspace(1.5, 0.5, dims, dtype=torch.float64), seed=7)
    model = Linear(dims)
    hits = torch.zeros(3)
    kappas = []
    for _ in range(repetitions):
        batches = truth.draw(count).split(250)
        fisher = ck.estimate_fisher(model, linear_loss, batches, direction=direction)
        statistics = fisher.statistics
        curvature = float(truth.curvature(fisher)[0])
        for i, (value, error, true) in enumerate(
            [
                (float(fisher.curvatures[0]), statistics.curvature_se[0], curvature),
                (statistics.rho, statistics.rho_se, curvature / truth.trace),
                (statistics.kappa, statistics.kappa_se, truth.kappa),
            ]
        ):
            hits[i] += abs(value - true) <= 1.96 * error
        kappas.append((statistics.kappa, statistics.kappa_se))
    low, high = accepted(repetitions)
    assert bool(((hits / repetitions >= low) & (hits / repetitions <= high)).all()), hits / repetitions
    values, errors = torch.tensor(kappas).T
    # No bias: the mean is within 3.3 of its own standard errors (p = 0.001); and the errors have the right size: the
    # standard deviation of n normal values is itself known to 1 / sqrt(2 n).
    assert abs(float(values.mean()) - truth.kappa) < 3.3 * float(values.std()) / math.sqrt(repetitions)
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=3.3 / math.sqrt(2 * repetitions))


def test_in_sample_curvatures_have_no_honest_interval():
    """Pure noise in more dimensions than samples: held out, a is right; in-sample, 1 + P / N instead of 1."""
    dims, count, repetitions = 300, 200, 150
    truth = Simulation(torch.zeros(dims, dtype=torch.float64), torch.ones(dims, dtype=torch.float64), seed=8)
    model = Linear(dims)
    hits = {True: 0, False: 0}
    for _ in range(repetitions):
        x = truth.draw(count)
        for unbiased in hits:
            fisher = ck.estimate_fisher(model, linear_loss, [x[:100], x[100:]], unbiased=unbiased)
            error = fisher.statistics.curvature_se[0]
            if not unbiased:
                error = float((x @ fisher.directions[0]).square().std()) / math.sqrt(count)
            hits[unbiased] += abs(float(fisher.curvatures[0]) - 1) <= 1.96 * error
    low, high = accepted(repetitions)
    assert low <= hits[True] / repetitions <= high
    assert hits[False] == 0


def test_signal_share_and_samples_needed_are_the_truth():
    """samples_needed samples give a direction whose squared cosine to mu is 0.9; and signal_share estimates it."""
    dims, repetitions = 40, 120
    mu = torch.nn.functional.normalize(torch.ones(dims, dtype=torch.float64), dim=0)
    truth = Simulation(mu, torch.ones(dims, dtype=torch.float64), seed=9)
    model = Linear(dims)
    needed = math.ceil(2 * 9 * (1 - truth.kappa) / truth.kappa)  # half of the data gives the direction
    # One estimate from many samples finds that number; kappa is known to a few per cent then.
    statistics = ck.estimate_fisher(model, linear_loss, truth.draw(20_000).split(2000)).statistics
    assert statistics.samples_needed == pytest.approx(needed, rel=4 * statistics.kappa_se / statistics.kappa)
    assert 4 * statistics.kappa_se / statistics.kappa < 0.2
    cosines, shares = [], []
    for _ in range(repetitions):
        fisher = ck.estimate_fisher(model, linear_loss, truth.draw(needed).split(needed // 2))
        cosines.append(float(fisher.directions[0] @ mu) ** 2)
        shares.append(fisher.statistics.signal_share)
    for values in (torch.tensor(cosines), torch.tensor(shares)):
        assert float(values.mean()) == pytest.approx(0.9, abs=0.01)
    assert statistics.signal_share == pytest.approx(10_000 / (10_000 + 40), abs=0.001)


def test_a_mean_that_is_mostly_noise_is_warned_about():
    dims = 40
    mu = torch.nn.functional.normalize(torch.ones(dims, dtype=torch.float64), dim=0)
    x = Simulation(mu, torch.ones(dims, dtype=torch.float64), seed=10).draw(400)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ck.estimate_fisher(Linear(dims), linear_loss, x.split(50))
    assert not [w for w in caught if "mostly noise" in str(w.message)]
    few = x[:20]
    with pytest.warns(UserWarning, match=r"mean gradient is mostly noise: its signal share is 0\.\d\d with 20 samples"):
        ck.estimate_fisher(Linear(dims), linear_loss, [few])
    weak = x - 0.97 * mu

    def two(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return linear_loss(model, batch[:, 1:]), batch[:, 0].long()

    both = torch.stack([torch.cat([torch.zeros(400, 1), x], 1), torch.cat([torch.ones(400, 1), weak], 1)], 1)
    with pytest.warns(UserWarning, match="mean gradient of stratum 1 is mostly noise"):
        ck.estimate_fisher(Linear(dims), two, both.flatten(0, 1).split(100))


# Files


def test_statistics_survive_a_file_and_old_files_load(tmp_path):
    path = tmp_path / "fisher.safetensors"
    _, batches = stratified()
    fisher = ck.estimate_fisher(Net().double(), by_class, batches, rank=2)
    fisher.save(path)
    assert str(ck.load_fisher(path).statistics) == str(fisher.statistics)  # nan differs from itself
    assert ck.load_fisher(path).statistics.term_strata == (-1, -1, 3, 3, 8, 8)

    kind, tensors, facts = files.read(path)
    old = ("num_samples", "trace", "mean_gradient_sq_norm", "kappa", "rho")
    facts["statistics"] = {name: asdict(fisher.statistics)[name] for name in old}
    files.write(path, kind, tensors, facts)
    loaded = ck.load_fisher(path).statistics
    assert loaded.rho == fisher.statistics.rho
    assert loaded.strata == ()
    assert math.isnan(loaded.kappa_se)


# Several processes


PARALLEL = [
    {},
    {"kind": "diagonal"},
    {"unbiased": False},
    {"strata": True},
    # So few samples that merging sketches loses nothing: ten in the first half, and k + 8 rows.
    {"count": 20, "rank": 2},
    {"count": 20, "strata": True, "direction": "top"},
]


def share_of(rank: int, count: int = 60) -> list:
    """Of two processes, one has more data than the other, and other strata first."""
    batches = stratified(count, count // 10)[1]
    return batches[:4] if rank == 0 else batches[4:]


def estimate_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        model = Net().double()
        for i, options in enumerate(PARALLEL):
            wrapped = nn.parallel.DistributedDataParallel(model) if i % 2 else model
            group = {} if i % 2 else {"process_group": torch.distributed.group.WORLD}
            fisher = estimate_shared(wrapped, share_of(rank, options.get("count", 60)), **options, **group)
            fisher.save(f"{folder}/{i}-{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def estimate_shared(model: nn.Module, batches: list, strata: bool = False, count: int = 60, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = by_class if strata else lambda model, batch: loss(model, batch[:2])
        return ck.estimate_fisher(model, chosen, batches, **options)


def test_two_processes_estimate_what_one_does_from_all_their_samples(tmp_path):
    torch.multiprocessing.spawn(estimate_in_parallel, (str(tmp_path),), nprocs=2)
    model = Net().double()
    for i, options in enumerate(PARALLEL):
        count = options.get("count", 60)
        zero, one = (share_of(rank, count) for rank in (0, 1))
        union = [*zero[:2], *one[:3], *zero[2:], *one[3:]]  # first halves, then second halves
        expected = estimate_shared(model, union, **options)
        found = [ck.load_fisher(tmp_path / f"{i}-{rank}.safetensors") for rank in (0, 1)]
        assert str(found[0].statistics) == str(found[1].statistics)
        assert found[0].statistics.num_samples == count
        if "kind" in options:
            assert torch.equal(found[0].fisher_diagonal, found[1].fisher_diagonal)
            torch.testing.assert_close(found[0].fisher_diagonal, expected.fisher_diagonal, rtol=1e-6, atol=0)
            continue
        assert torch.equal(found[0].directions, found[1].directions)
        assert torch.equal(found[0].curvatures, found[1].curvatures)
        torch.testing.assert_close(found[0].curvatures, expected.curvatures, rtol=1e-6, atol=0)
        overlap = (flat(found[0]) * flat(expected)).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-6, atol=0)
        ours, theirs = asdict(found[0].statistics), asdict(expected.statistics)
        for name in ("trace", "rho", "rho_se", "kappa", "curvature_se", "signal_share", "samples_needed"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, nan_ok=True), name
        assert found[0].statistics.term_strata == expected.statistics.term_strata


def test_progress_is_shown_on_stderr(capsys):
    ck.estimate_fisher(Net(), loss, loader(), progress=True)
    lines = capsys.readouterr().err.replace("\r", "").splitlines()
    assert [line.split(" samples")[0] for line in lines] == ["Fisher, directions: 25", "Fisher, curvatures: 25"]
    ck.estimate_fisher(Net(), loss, loader())
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
        ({"max_samples": 1}, "max_samples is 1; expected at least 2"),
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
        ck.estimate_fisher(Net(), arguments.pop("per_sample_loss"), arguments.pop("loader"), **arguments)
