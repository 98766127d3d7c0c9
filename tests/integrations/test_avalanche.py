"""Avalanche's strategies and streams: the same training as a plain loop, with heads that grow, and resumed as ever."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.pages import DOCS, run_python_blocks
from helpers.past_tasks import HISTORIES, KINDS, MODES, flat
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import crl_kernels as ck

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace|.*mostly noise:UserWarning")
avalanche = pytest.importorskip("avalanche", reason="avalanche-lib is not installed (extra integrations)")

import dill  # noqa: E402 - it comes with Avalanche
from avalanche.benchmarks import nc_benchmark  # noqa: E402
from avalanche.benchmarks.classic import SplitMNIST  # noqa: E402
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint  # noqa: E402
from avalanche.models import (  # noqa: E402
    IncrementalClassifier,
    MultiHeadClassifier,
    MultiTaskModule,
    avalanche_forward,
)
from avalanche.models.utils import avalanche_model_adaptation  # noqa: E402
from avalanche.training.plugins import EWCPlugin as AvalanchesEWCPlugin  # noqa: E402
from avalanche.training.plugins import SupervisedPlugin  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

from crl_kernels.integrations.avalanche import EWCPlugin  # noqa: E402 - it imports avalanche

LAM, BATCH, LR = 2.0, 16, 0.1


def digits_stream(task_labels: bool = False, experiences: int = 5, train: int = 1200):
    """scikit-learn's digits, two classes after two."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (extra trainer)")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    parts = []
    for part in (slice(0, train), slice(train, None)):
        parts.append(TensorDataset(x[part], y[part]))
        parts[-1].targets = y[part].tolist()
    return nc_benchmark(*parts, n_experiences=experiences, task_labels=task_labels, seed=0)


def growing_classifier(inputs: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), IncrementalClassifier(24))


class WithHeads(MultiTaskModule):
    """One head for each task."""

    def __init__(self, inputs: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU())
        self.heads = MultiHeadClassifier(24)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads(self.features(x), task_labels)


class Seeds(SupervisedPlugin):
    """So that a plain loop can draw the same random numbers for the estimate."""

    def after_training_exp(self, strategy, **kwargs) -> None:
        torch.manual_seed(7)


class StopsEarly(SupervisedPlugin):
    def after_training_iteration(self, strategy, **kwargs) -> None:
        if strategy.clock.train_exp_iterations == 20:
            strategy.stop_training()


class Breaks(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def before_update(self, strategy, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyError("broken")


def strategy_of(model: nn.Module, *plugins: SupervisedPlugin, optimizer=torch.optim.SGD, lr: float = LR, **options):
    defaults = {"train_mb_size": BATCH, "train_epochs": 1, "eval_mb_size": 100, "evaluator": None}
    optimizer = optimizer(model.parameters(), lr=lr)
    return Naive(model=model, optimizer=optimizer, plugins=list(plugins), **(defaults | options))


def batches(experience, shuffle: bool = False) -> DataLoader:
    return DataLoader(experience.dataset, BATCH, shuffle, collate_fn=experience.dataset.collate_fn)


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y, task_labels = batch
    return nn.functional.cross_entropy(avalanche_forward(model, x, task_labels), y, reduction="none")


def plain_loop(model: nn.Module, history, experiences, decoupled: bool, batches_of=batches) -> int:
    """The steps without a strategy; Avalanche's model grows by itself. Returns the number of steps."""
    steps = 0
    for experience in experiences:
        torch.manual_seed(8)
        avalanche_model_adaptation(model, experience)
        history.rebind(model, grown=["*classifier*"])
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for batch in batches_of(experience):
            optimizer.zero_grad()
            cross_entropy(model, batch).mean().backward()
            if not decoupled:
                history.add_penalty_grad_(LAM)
            optimizer.step()
            if decoupled:
                history.decoupled_step_(LAM, LR)
            steps += 1
        torch.manual_seed(7)
        kind = "low_rank" if isinstance(history, ck.LowRankHistory) else "diagonal"
        history.append(ck.estimate_fisher(model, cross_entropy, batches(experience, shuffle=True), kind=kind))
    return steps


def distance_from_the_first_task(kind: str, benchmark, model: nn.Module, lam: float, *plugins, **options) -> float:
    """The first task's penalty after the stream, with lam = 1."""
    first, history = HISTORIES[kind](model), HISTORIES[kind](model)
    strategy = strategy_of(model, EWCPlugin(history, lam, decoupled=True, max_samples=500), *plugins, **options)
    for i, experience in enumerate(benchmark.train_stream):
        torch.manual_seed(i)
        strategy.train(experience)
        strategy.eval(benchmark.test_stream[: i + 1])
        if i == 0:
            first.rebind(model, grown=["*"])
            first.load_state_dict(history.state_dict())
    assert history.state_dict()["num_tasks"] == i + 1
    first.rebind(model, grown=["*"])
    return first.penalty(1.0).item()


@KINDS
@MODES
@pytest.mark.parametrize("network", [growing_classifier, WithHeads])
def test_three_growing_experiences_equal_a_plain_loop(kind, decoupled, network):
    stream = digits_stream(task_labels=network is WithHeads).train_stream[:3]
    model, plain = network(), network()
    history, plain_history = HISTORIES[kind](model), HISTORIES[kind](plain)
    strategy = strategy_of(model, Seeds(), EWCPlugin(history, LAM, decoupled=decoupled))
    for experience in stream:
        torch.manual_seed(8)
        strategy.train(experience, shuffle=False)
    assert plain_loop(plain, plain_history, stream, decoupled) > 30
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-6)
    state, expected = history.state_dict(), plain_history.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-6)

    free = network()
    strategy = strategy_of(free)
    for experience in stream:
        torch.manual_seed(8)
        strategy.train(experience, shuffle=False)
    assert float((flat(free) - flat(model)).norm()) > 0.01  # the penalty has done something


def test_the_page_equals_a_plain_loop(monkeypatch):
    starts, batches_seen, experiences = [], [], []

    class Records(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs) -> None:
            experiences.append(strategy.experience)

        def after_update(self, strategy, **kwargs) -> None:
            batches_seen.append((len(experiences), strategy.mbatch))

    class Recorded(Naive):
        def train(self, *arguments, **options) -> None:
            if not starts:
                starts.append(copy.deepcopy(self.model))
                self.plugins[:0] = [Seeds(), Records()]
            torch.manual_seed(8)
            super().train(*arguments, **options)

    monkeypatch.setattr("avalanche.training.supervised.Naive", Recorded)
    torch.manual_seed(0)
    page = run_python_blocks(DOCS / "how-to" / "other-trainers.md", section="Avalanche")

    plain, history = starts[0], ck.LowRankHistory(starts[0])
    order = {id(experience): [b for n, b in batches_seen if n == i] for i, experience in enumerate(experiences, 1)}
    assert plain_loop(plain, history, experiences, decoupled=True, batches_of=lambda e: order[id(e)]) == 15
    torch.testing.assert_close(flat(page["classifier"]), flat(plain), rtol=0, atol=1e-6)
    torch.testing.assert_close(page["history"].curvatures, history.curvatures, rtol=1e-4, atol=0)
    assert plain[-1].classifier.out_features == 6


class OneHotError(nn.MSELoss):
    """Its loss of a sample is a mean over the classes."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return super().forward(output, nn.functional.one_hot(y, output.shape[1]).float())


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), OneHotError(), OneHotError(reduction="sum")],
    ids=lambda criterion: f"{type(criterion).__name__} {criterion.reduction}",
)
def test_the_fisher_is_of_each_samples_own_gradient(criterion):
    """Which the square of a batch's mean gradient, of which Avalanche's own plugin takes the mean, is not."""
    (experience,) = digits_stream(experiences=1, train=200).train_stream
    model = growing_classifier()
    history, avalanches = ck.DiagonalHistory(model), AvalanchesEWCPlugin(LAM)
    strategy_of(model, EWCPlugin(history, LAM), avalanches, criterion=criterion, lr=0.01).train(experience)

    model.eval()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y, _ in DataLoader(experience.dataset, 1, collate_fn=experience.dataset.collate_fn):
        gradients = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
        for square, gradient in zip(expected.values(), gradients, strict=True):
            square += gradient.square() / 200
    state = history.state_dict()
    for name, square in expected.items():
        torch.testing.assert_close(state[f"fisher_diagonal.{name}"], square, rtol=1e-4, atol=1e-8)
    trace = float(sum(square.sum() for square in expected.values()))
    avalanches_trace = float(sum(part.data.sum() for part in avalanches.importances[0].values()))
    assert not 0.7 < avalanches_trace / trace < 1.4


def test_rank_max_samples_and_a_loss_of_the_users_own():
    (experience,) = digits_stream(experiences=1, train=200).train_stream
    model, seen = growing_classifier(), []

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        seen.append(len(batch[0]))
        return cross_entropy(model, batch)

    history = ck.LowRankHistory(model)
    plugin = EWCPlugin(history, LAM, rank=3, max_samples=64, per_sample_loss=loss)
    strategy_of(model, plugin, criterion=nn.functional.cross_entropy).train(experience)
    assert len(history) == 3
    assert set(seen) == {BATCH}


@KINDS
def test_a_stream_of_tasks_stays_near_the_first_one(kind):
    benchmark = digits_stream(task_labels=True)
    options = {"optimizer": torch.optim.AdamW, "lr": 0.01}
    free, held = (distance_from_the_first_task(kind, benchmark, WithHeads(), lam, **options) for lam in (0.0, 1e4))
    assert 0 < held < 0.1 * free


@KINDS
def test_split_mnist(kind):
    """Avalanche's own benchmark, of real images."""
    root = os.environ.get("CRL_DATA")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip(f"the environment variable CRL_DATA names no folder with MNIST/raw in it (it is {root!r})")
    benchmark = SplitMNIST(n_experiences=5, return_task_id=True, seed=0, dataset_root=root)
    benchmark = SimpleNamespace(train_stream=benchmark.train_stream, test_stream=[])
    free, held = (
        distance_from_the_first_task(kind, benchmark, WithHeads(784), lam, StopsEarly()) for lam in (0.0, 1e4)
    )
    assert 0 < held < 0.1 * free


@KINDS
@pytest.mark.parametrize("network", [growing_classifier, WithHeads])
def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path, monkeypatch, kind, network):
    # Otherwise dill pickles the code of torch's optimizers, whose modules torch.optim hides; with torch 2.14 it fails.
    monkeypatch.setitem(dill.settings, "byref", True)
    stream = digits_stream(task_labels=network is WithHeads).train_stream[:3]
    path, ends, states = tmp_path / "checkpoint", {}, {}
    for run in ("uninterrupted", "interrupted", "resumed"):
        model = network()
        strategy = strategy_of(model, EWCPlugin(HISTORIES[kind](model), LAM), optimizer=torch.optim.AdamW, lr=0.01)
        strategy, first = maybe_load_checkpoint(strategy, path)
        assert first == (2 if run == "resumed" else 0)
        for i, experience in enumerate(stream[first:], first):
            torch.manual_seed(i)
            strategy.train(experience)
            if run == "interrupted" and i == 1:
                save_checkpoint(strategy, path)
                break
        ends[run], states[run] = flat(strategy.model), strategy.plugins[0].history.state_dict()
    assert torch.equal(ends["resumed"], ends["uninterrupted"])
    assert states["resumed"].keys() == states["uninterrupted"].keys()
    assert all(torch.equal(value, states["uninterrupted"][name]) for name, value in states["resumed"].items())
    assert states["resumed"]["num_tasks"] == 3


def test_an_experience_ended_by_an_exception_can_be_trained_again():
    stream = digits_stream().train_stream
    model = growing_classifier()
    history = ck.LowRankHistory(model)
    strategy = strategy_of(model, EWCPlugin(history, LAM), Breaks())
    with pytest.raises(KeyError, match="broken"):
        strategy.train(stream[0])
    strategy.train(stream[0])
    assert len(history) == 1


def test_what_it_cannot_do_is_refused_before_a_parameter_changes():
    stream = digits_stream().train_stream
    model = growing_classifier()
    for criterion, found in (
        (nn.functional.cross_entropy, r"function with reduction=None"),
        (nn.CrossEntropyLoss(reduction="none"), r"CrossEntropyLoss with reduction='none'"),
    ):
        strategy = strategy_of(model, EWCPlugin(ck.LowRankHistory(model), LAM), criterion=criterion)
        before = flat(model[1])
        with pytest.raises(ValueError, match=rf"criterion is a {found}; expected 'mean' or 'sum'.*per_sample_loss="):
            strategy.train(stream[0])
        assert torch.equal(flat(model[1]), before)
    other = ck.DiagonalHistory(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="which the model lacks"):
        strategy_of(model, EWCPlugin(other, LAM)).train(stream[0])
