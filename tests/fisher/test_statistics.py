"""Statistics of estimates, against simulations with a known Fisher, and in files."""

import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers.fisher_problems import IGNORE_ESTIMATE_WARNINGS, Linear, Network, linear_loss, loss_and_class, stratified
from torch import Tensor, nn

import crl_kernels as ck
from crl_kernels import files

pytestmark = IGNORE_ESTIMATE_WARNINGS


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
    noise = r"mean gradient is mostly noise: its signal share is 0\.\d\d with 20 samples"
    with pytest.warns(ck.FisherWarning, match=noise) as warned:
        ck.estimate_fisher(Linear(dims), linear_loss, [few])
    (warning,) = (record.message for record in warned if record.message.kind == "signal_share")
    assert str(warning) == f"{warning.finding} Give a longer loader or a larger max_samples=, or use direction='top'."
    weak = x - 0.97 * mu

    def two(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return linear_loss(model, batch[:, 1:]), batch[:, 0].long()

    both = torch.stack([torch.cat([torch.zeros(400, 1), x], 1), torch.cat([torch.ones(400, 1), weak], 1)], 1)
    with pytest.warns(UserWarning, match="mean gradient of stratum 1 is mostly noise"):
        ck.estimate_fisher(Linear(dims), two, both.flatten(0, 1).split(100))


def test_statistics_survive_a_file_and_old_files_load(tmp_path):
    path = tmp_path / "fisher.safetensors"
    _, batches = stratified()
    fisher = ck.estimate_fisher(Network().double(), loss_and_class, batches, rank=2)
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
