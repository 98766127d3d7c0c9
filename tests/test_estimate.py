"""Fisher estimation: against a loop over samples, on gradients that are known, and leaving everything as it was."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import crl_kernels as ck


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


def loop_gradients(model: nn.Module, count: int = 50) -> Tensor:
    """(N, P) float64: one backward pass per sample."""
    model.eval()
    x, y = data(count)
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
def quiet(recwarn):
    """Small random problems are not rank 1; the warning about it has a test of its own."""
    warnings.filterwarnings("ignore", message="only .* of the trace")


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


def test_top_directions_equal_a_singular_value_decomposition():
    model = Net()
    gradients = loop_gradients(model)
    rank = 3
    fisher = ck.estimate_fisher(model, loss, loader(batch_size=25), rank=rank)
    _, _, rows = torch.linalg.svd(gradients[:25], full_matrices=False)
    overlap = (flat(fisher) @ rows[:rank].T).abs()
    torch.testing.assert_close(overlap, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(fisher.curvatures, (gradients[25:] @ rows[:rank].T).square().mean(0), rtol=1e-3, atol=0)


def test_directions_merged_over_batches_hold_almost_all_that_the_best_ones_do():
    model = Net()
    gradients = loop_gradients(model, 200)
    fisher = ck.estimate_fisher(model, loss, loader(200, batch_size=10), rank=3)
    first = gradients[:100]
    best = torch.linalg.svdvals(first)[:3].square().sum()
    assert float((first @ flat(fisher).T).square().sum() / best) > 0.999


class RankOne(nn.Module):
    """Per-sample gradients are s_i v: loss_i = s_i v . theta."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(20))
        self.register_buffer("v", torch.nn.functional.normalize(torch.arange(1.0, 21.0), dim=0))


def test_a_fisher_of_known_rank_1_is_found():
    model = RankOne()
    scales = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 2
    batches = DataLoader(TensorDataset(scales), batch_size=50)
    fisher = ck.estimate_fisher(model, lambda model, batch: batch[0] * (model.v @ model.theta), batches)
    torch.testing.assert_close(fisher.directions[0], model.v, rtol=1e-5, atol=1e-6)
    second = scales[200:].double()
    torch.testing.assert_close(fisher.curvatures[0], second.square().mean(), rtol=1e-5, atol=0)
    assert fisher.statistics.rho == pytest.approx(1.0, abs=1e-5)


def test_curvature_is_held_out():
    """Pure noise, N < P: the samples that gave the direction find it steep, fresh ones do not."""
    model = RankOne()
    noise = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="of the trace of the Fisher lies along the mean gradient"):
        fisher = ck.estimate_fisher(model, lambda model, batch: batch @ model.theta, noise.split(16))
    u = flat(fisher)[0]
    in_sample, held_out = ((half.double() @ u).square().mean() for half in (noise[:32], noise[32:]))
    torch.testing.assert_close(fisher.curvatures[0], held_out, rtol=1e-5, atol=0)
    assert float(in_sample) > 1.3 * float(held_out)


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


def test_a_loss_that_vmap_cannot_run_gives_the_same_numbers_slowly():
    model = Net()

    def stubborn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = loss(model, batch)
        return losses * (1.0 if losses[0].item() > 0 else 2.0)

    expected = ck.estimate_fisher(model, loss, loader(), kind="diagonal")
    with pytest.warns(UserWarning, match="cannot be vectorised over samples"):
        fisher = ck.estimate_fisher(model, stubborn, loader(), kind="diagonal")
    torch.testing.assert_close(fisher.fisher_diagonal, expected.fisher_diagonal, rtol=1e-4, atol=1e-8)


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


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(kind, fails):
    model = Net()
    model.layers[1].eval()  # a mixed mode
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.unused.grad = None
    calls = 0

    def meddling(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        model.layers[1].running_mean.add_(1)
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        if fails and calls == 3:
            raise Broken
        assert not model.training
        return loss(model, batch)

    def state() -> list:
        return [
            [module.training for module in model.modules()],
            {name: value.clone() for name, value in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
            torch.tensor(random.getstate()[1]),
            torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
            [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        ]

    before = state()
    identities = [id(p.grad) for p in model.parameters()]
    if fails:
        with pytest.raises(Broken):
            ck.estimate_fisher(model, meddling, loader(), kind=kind)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ck.estimate_fisher(model, meddling, loader(), kind=kind)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert [id(p.grad) for p in model.parameters()] == identities


def test_storage_dtypes_and_selection():
    model = Net()
    assert ck.estimate_fisher(model, loss, loader(), storage_dtype=torch.bfloat16).directions.dtype == torch.bfloat16
    fisher = ck.estimate_fisher(model, loss, loader(), exclude=["unused", "layers.1"])
    history = ck.LowRankHistory(model, exclude=["unused", "layers.1"])
    history.append(fisher)
    assert float(history.drift().abs()) < 1e-12
    double = Net().double()
    batches = [(x.double(), y.double()) for x, y in loader()]
    assert ck.estimate_fisher(double, loss, batches).directions.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "full"}, "kind is 'full'; expected 'low_rank' or 'diagonal'"),
        ({"rank": 0}, "rank is 0; expected an integer >= 1"),
        ({"rank": 40}, "rank is 40, but the first half of the data has only 25 samples"),
        ({"kind": "diagonal", "rank": 2}, "belong to kind='low_rank'"),
        ({"max_samples": 1}, "max_samples is 1; expected at least 2"),
        ({"loader": []}, "loader yields no samples"),
        ({"loader": [data(1)]}, "loader yields one sample"),
        ({"loader": [(torch.zeros(3, 6), torch.zeros(2, 3))]}, "no common first dimension"),
        ({"per_sample_loss": lambda m, b: loss(m, b).mean()}, r"returned shape \(\) for a batch of"),
        ({"per_sample_loss": lambda m, b: loss(m, b)[:, None]}, r"returned shape \(\d+, 1\) for a batch of"),
        ({"per_sample_loss": lambda m, b: loss(m, b)[:, None], "kind": "diagonal"}, r"returned shape \(1, 1\)"),
        ({"per_sample_loss": lambda m, b: loss(m, b).mean(), "rank": 2}, r"returned shape \(\) for a batch of"),
        ({"per_sample_loss": torch.no_grad()(loss)}, "carries no gradient"),
        ({"per_sample_loss": torch.no_grad()(loss), "kind": "diagonal"}, "every per-sample gradient is zero"),
        ({"per_sample_loss": lambda m, b: loss(m, b) * float("nan")}, "NaN or infinite"),
        ({"per_sample_loss": lambda m, b: 0 * loss(m, b)}, "mean gradient .* is zero"),
    ],
)
def test_bad_input_gives_one_clear_error(change, message):
    arguments = {"per_sample_loss": loss, "loader": loader()} | change
    with pytest.raises(ValueError, match=message):
        ck.estimate_fisher(Net(), arguments.pop("per_sample_loss"), arguments.pop("loader"), **arguments)
