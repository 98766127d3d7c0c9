"""Is rank 1 enough: on gradients whose spectrum is known, and leaving the model as it was."""

import builtins
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crl_kernels.diagnostics.diagnose import diagnose
from crl_kernels.diagnostics.diagnosis import Diagnosis
from crl_kernels.diagnostics.spectrum import GROUPS, _student, spectrum_of
from crl_kernels.diagnostics.verdict import judge


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(g: Tensor, **options):
    """Of gradients (N, P), with their group diagonals."""
    groups = torch.stack([part.square().mean(0) for part in g.chunk(GROUPS)])
    return spectrum_of(g @ g.T, groups @ groups.T, **options)


# The pure function


def test_eigenvalues_in_sample_are_those_of_the_fisher():
    g = normal(64, 12) * torch.linspace(3, 0.2, 12)
    found = spectrum(g)
    expected = torch.linalg.eigvalsh(g.T @ g / 64).flip(0)
    trace = float(expected.sum())
    assert found.trace.value == pytest.approx(trace, rel=1e-12)
    assert found.eigenvalues[:12] == pytest.approx((expected / trace).tolist(), rel=1e-9)
    assert found.lambda1_share.value == pytest.approx(float(expected[0]) / trace, rel=1e-12)
    assert found.lambda2_over_lambda1.value == pytest.approx(float(expected[1] / expected[0]), rel=1e-12)
    assert found.stable_rank.value == pytest.approx(trace / float(expected[0]), rel=1e-12)


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
    found = spectrum(g)
    assert found.kappa.value == pytest.approx(mean_sq / trace, rel=1e-10)
    assert found.rho.value == pytest.approx(along / (mean_sq * trace), rel=1e-10)
    assert found.participation_ratio.value == pytest.approx(trace_sq / fro, rel=1e-10)
    assert found.mean_abs_cos.value == pytest.approx(cos, rel=1e-10)


def test_held_out_shares_and_errors_are_those_of_a_dense_computation():
    g = normal(96, 7) * torch.tensor([3.0, 2.0, 1, 1, 0.5, 0.5, 0.5]) + 0.4
    found = spectrum(g, ranks=(1, 2, 4))
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
        assert found.held_out[k].value == pytest.approx(float(held[:k].sum()) / trace, rel=1e-9)
        assert found.error[k].value == pytest.approx(math.sqrt(1 - float(caught[:k].sum()) / fro), rel=1e-9)
    assert found.held_out_mean.value == pytest.approx(mean / trace, rel=1e-9)
    assert found.top_over_mean.value == pytest.approx((float(held[0]) - mean) / trace, rel=1e-9)


def test_exact_rank_1_has_share_1_and_error_0():
    found = spectrum((normal(64) + 1)[:, None] * normal(9, seed=1))
    assert found.held_out[1].value == pytest.approx(1, abs=1e-12)
    assert found.held_out_mean.value == pytest.approx(1, abs=1e-12)
    assert found.error[1].value == pytest.approx(0, abs=1e-6)
    assert found.error_mean.value == pytest.approx(0, abs=1e-6)
    assert found.lambda2_over_lambda1.value == pytest.approx(0, abs=1e-12)
    assert found.participation_ratio.value == pytest.approx(1, rel=0.2)


def test_the_diagonal_is_exact_where_the_fisher_is_diagonal():
    """One coordinate a sample: G is block-like, and F is diagonal with equal entries in every group."""
    g = torch.eye(4, dtype=torch.float64).repeat(16, 1)
    found = spectrum(g)
    # |F|^2 over different samples: 15 of the 63 others share the coordinate; sum F_jj^2 = 4 / 16.
    assert found.error_diagonal.value == pytest.approx(math.sqrt(max(0.0, 1 - 0.25 / (15 / 63))), abs=1e-9)
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
    found = [spectrum(normal(128, 6, seed=100 + i) * scale + mu, ranks=(1,)) for i in range(trials)]
    true["held_out"] = float(np.mean([s.held_out[1].value for s in found]))
    for name, value in true.items():
        estimates = [s.held_out[1] if name == "held_out" else getattr(s, name) for s in found]
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


# The verdict, on models


class Linear(nn.Module):
    """loss_i = x_i . theta, so that g_i = x_i; or a least-squares loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.theta


def linear_loss(model: nn.Module, batch: Tensor, t: Tensor) -> Tensor:
    return model(batch)


def run(g: Tensor, **options) -> Diagnosis:
    return diagnose(Linear(g.shape[1]), linear_loss, [g], (10, 500), samples=len(g), **options)


def test_a_model_for_which_rank_1_is_right_is_told_so():
    v = normal(20, seed=1)
    found = run((normal(128)[:, None] * 0.4 + 2) * v + 0.3 * normal(128, 20, seed=2)).verdict
    assert (found.answer, found.direction, found.use) == ("yes", "mean", "mean")
    assert found.enough_at == (10, 500)
    assert found.sentences[0].startswith("Rank 1 is enough here: with t uniform the mean gradient holds")
    assert 'direction="mean"' in found.sentences[2]


def test_collinear_gradients_of_both_signs_ask_for_the_top_eigenvector():
    """lambda_1 / trace is high, and the mean vanishes: signs alternate within every half."""
    v = normal(60, seed=1)
    v /= v.norm()
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(128)[:, None]
    found = run(3 * signs * v + 0.3 * normal(256, 60, seed=2))
    assert found.uniform.lambda1_share.value > 0.6
    assert not found.uniform.kappa.low > 0
    assert math.isnan(found.uniform.rho.value)
    assert (found.verdict.answer, found.verdict.direction, found.verdict.use) == ("yes", "top", "top")
    assert "along the top eigenvector and not along the mean gradient" in found.verdict.sentences[0]
    assert "lost in noise" in found.verdict.sentences[0]
    assert 'direction="top"' in found.verdict.sentences[2]


def test_at_a_least_squares_optimum_rank_1_is_not_enough():
    x, noise = normal(192, 40), normal(192, seed=1)
    y = x.sum(1) + noise
    model = Linear(40)
    with torch.no_grad():
        model.theta.copy_(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return (model(batch[0]) - batch[1]).square() / 2

    found = diagnose(model, loss, [(x, y)], (10, 500), samples=192)
    assert found.uniform.kappa.value == pytest.approx(-1 / 191, rel=1e-6)  # the mean gradient is zero
    assert (found.verdict.answer, found.verdict.use) == ("no", "diagonal")
    assert found.verdict.not_at == (10, 500)
    assert found.verdict.sentences[0].startswith("Rank 1 is not enough here")
    assert "lost in noise" in found.verdict.sentences[0]
    assert 'kind="diagonal"' in found.verdict.sentences[2]


def test_few_directions_ask_for_their_rank():
    scale = torch.tensor([3.0, 3.0, 3.0, 3.0] + [0.5] * 16, dtype=torch.float64)
    found = run(normal(256, 20) * scale).verdict
    assert (found.answer, found.use) == ("no", "rank 4")
    assert "rank=4" in found.sentences[2]


def test_one_direction_for_each_timestep_asks_for_bands():
    """Every timestep has a direction of its own: F over all of them has rank 5 and flat eigenvalues."""
    times = [0, 1, 2, 3, 4]

    class Banded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(40, dtype=torch.float64))

        def forward(self, g: Tensor) -> Tensor:
            return g @ self.theta

    basis = torch.linalg.qr(normal(40, 5))[0].T

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        signed, noise = batch
        return model(3 * signed[:, None] * basis[t] + 0.1 * noise)

    data = normal(192), normal(192, 40, seed=1)
    generator = torch.Generator().manual_seed(0)
    found = diagnose(Banded(), loss, [data], times, num_timesteps=5, samples=192, generator=generator)
    assert found.verdict.enough_at == tuple(times)
    assert found.verdict.answer == "no"
    assert found.bands is not None
    assert found.bands.low > 0.9
    assert found.bands.value > found.uniform.held_out[4].value
    # Four of five directions hold half already; where they do not, the five timesteps' own are next.
    assert found.verdict.use == "rank 4"
    less = {k: share for k, share in found.uniform.held_out.items() if k not in (2, 4)}
    verdict = judge(replace(found.uniform, held_out=less), found.at, found.bands)
    assert verdict.use == "bands"
    assert "strata" in verdict.sentences[2]


# A network: layers, cosines, records


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) + 0.01 * t[:, None]))


def net_loss(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    return (model(batch[0], t) - batch[1]).square().mean(1)


def net_data(count: int = 64) -> tuple[Tensor, Tensor]:
    return normal(count, 6, seed=3).float(), normal(count, 3, seed=4).float() + 1


@pytest.fixture(scope="module")
def diagnosed() -> Diagnosis:
    x, y = net_data()
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    return diagnose(Net(), net_loss, batches, (20, 100, 900), samples=64, snr=lambda t: 100 / (t + 1))


def test_layers_are_those_of_a_dense_computation(diagnosed):
    model = Net().eval()
    x, y = net_data()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    rows: dict[str, list[Tensor]] = {"first": [], "norm": [], "last": []}
    for i in order.tolist():
        loss = net_loss(model, (x[i : i + 1], y[i : i + 1]), torch.tensor([100]))
        grads = torch.autograd.grad(loss.sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            rows[name.split(".")[0]].append(g.flatten())
    assert set(diagnosed.layers) == set(rows)
    total = []
    for name, pieces in rows.items():
        g = torch.stack([torch.cat(pieces[2 * i : 2 * i + 2]) for i in range(64)]).double()
        total.append(g)
        expected, found = spectrum(g), diagnosed.layers[name]["100"]
        for key in ("trace", "kappa", "lambda1_share", "held_out_mean", "error_diagonal", "mean_abs_cos"):
            assert getattr(found, key).value == pytest.approx(getattr(expected, key).value, rel=1e-3, abs=1e-4), key
            assert getattr(found, key).high == pytest.approx(getattr(expected, key).high, rel=1e-2, abs=1e-3), key
    whole = spectrum(torch.cat(total, 1))
    assert diagnosed.at[100].held_out[4].value == pytest.approx(whole.held_out[4].value, rel=1e-4)


def test_cosines_are_symmetric_and_near_one_for_near_timesteps():
    x, y = net_data(256)
    cosines = torch.tensor(diagnose(Net(), net_loss, [(x, y)], (20, 21, 400), samples=256).cosines)
    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(4))
    assert float(cosines[0, 1]) > 0.98


def test_the_record_comes_back(diagnosed, tmp_path):
    paths = diagnosed.save(tmp_path / "a", "A title")
    assert {p.name for p in paths} >= {"report.json", "report.md", "collinearity.png", "layers.svg", "cosines.png"}
    assert len(paths) == 12
    for path in paths:
        assert path.stat().st_size > (5_000 if path.suffix in (".png", ".svg") else 500)
    raw = json.loads((tmp_path / "a" / "report.json").read_text())
    assert raw["uniform"]["trace"][0] == pytest.approx(diagnosed.uniform.trace.value, rel=1e-5)
    again = Diagnosis.load(tmp_path / "a")
    assert again.verdict == diagnosed.verdict
    assert list(again.at) == [20, 100, 900]
    assert again.snr == pytest.approx({20: 100 / 21, 100: 100 / 101, 900: 100 / 901}, rel=1e-5)
    again.save(tmp_path / "b", "A title")
    for name in ("report.json", "report.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    text = (tmp_path / "a" / "report.md").read_text()
    assert text.startswith("# A title\n")
    assert all(sentence in text for sentence in diagnosed.verdict.sentences)


def test_without_matplotlib_the_numbers_are_written_all_the_same(diagnosed, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        diagnosed.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md"}


class Broken(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    model = Net()
    model.norm.eval()  # a mixed mode
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.last.bias.grad = None
    calls = 0

    def meddling(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        model.norm.running_mean.add_(1)
        random.random()
        np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        assert not model.training
        losses = net_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]), t)
        if fails and calls == 5:
            raise Broken
        return losses

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
    if fails:
        with pytest.raises(Broken):
            diagnose(model, meddling, [net_data(48)], (3,), samples=48)
    else:
        diagnose(model, meddling, [net_data(48)], (3,), samples=48)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_noise_follows_the_generator_and_parameters_can_be_chosen():
    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return net_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]), t)

    def trace(seed: int, **options) -> Diagnosis:
        generator = torch.Generator().manual_seed(seed)
        return diagnose(Net(), noisy, [net_data(48)], (3,), samples=48, generator=generator, **options)

    assert trace(1).uniform == trace(1).uniform
    assert trace(1).uniform != trace(2).uniform
    chosen = trace(1, exclude=["norm"])
    assert set(chosen.layers) == {"first", "last"}
    assert chosen.num_parameters == 6 * 8 + 8 + 8 * 3 + 3
    assert chosen.bands is None  # one timestep is no band


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": (1000,)}, r"timesteps has 1000; expected integers from 0 to num_timesteps - 1 = 999"),
        ({"timesteps": (1.5,)}, "timesteps has 1.5"),
        ({"timesteps": (3, 3)}, "none twice"),
        ({"timesteps": ()}, "at least one"),
        ({"samples": 47}, "samples is 47; expected at least 48"),
        ({"loader": []}, "loader yields 0 samples; expected at least 48"),
        ({"loader": [net_data(40)]}, "loader yields 40 samples"),
        ({"snr": [1.0, 2.0]}, "snr has 2 values for 1 timesteps"),
        ({"snr": {4: 1.0}}, "snr lacks the timesteps 3"),
        ({"loss": lambda m, b, t: net_loss(m, b, t).mean()}, r"returned shape \(\) for a batch of 48"),
        ({"loss": torch.no_grad()(net_loss)}, "carries no gradient"),
        ({"loss": lambda m, b, t: 0 * net_loss(m, b, t)}, "every per-sample gradient is zero"),
        ({"loss": lambda m, b, t: net_loss(m, b, t) * math.nan}, "NaN or infinite gradients"),
    ],
)
def test_bad_input_gives_one_clear_error(change, message):
    arguments = {"timesteps": (3,), "samples": 48, "loader": [net_data(48)], "loss": net_loss} | change
    loss, loader = arguments.pop("loss"), arguments.pop("loader")
    with pytest.raises(ValueError, match=message):
        diagnose(Net(), loss, loader, arguments.pop("timesteps"), **arguments)
