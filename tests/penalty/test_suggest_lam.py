"""suggest_lam: at strength 1 the drift halves within a task, measured on three kinds of network."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from helpers.past_tasks import KINDS, MODES, history_of, random_like, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import crl_kernels as ck

STEPS = 60
LR = 0.01


class Denoiser(nn.Module):
    """Predicts the noise in x (N, ...) at t (N,) in [0, 1]."""

    def __init__(self, first: nn.Module, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = first, inner, last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.inner(h + t.view(-1, *[1] * (h.dim() - 1))))


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return Denoiser(nn.Linear(16, 32), nn.Sequential(nn.SiLU(), nn.Linear(32, 32), nn.SiLU()), nn.Linear(32, 16)), (16,)


def convolutional() -> tuple[nn.Module, tuple[int, ...]]:
    inner = nn.Sequential(
        nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)
    )
    return Denoiser(nn.Conv2d(1, 8, 3, padding=1), inner, nn.Conv2d(8, 1, 3, padding=1)), (1, 6, 6)


def transformer() -> tuple[nn.Module, tuple[int, ...]]:
    inner = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return Denoiser(nn.Linear(4, 16), inner, nn.Linear(16, 4)), (5, 4)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
}


def losses(model: nn.Module, images: Tensor) -> Tensor:
    t, noise = torch.rand(len(images)), torch.randn_like(images)
    scale = t.view(-1, *[1] * (images.dim() - 1))
    return (model((1 - scale) * images + scale * noise, t) - noise).square().flatten(1).mean(1)


def learn(optimizer: torch.optim.Optimizer, model: nn.Module, images: Tensor, steps: int) -> None:
    torch.manual_seed(1)  # the same batches and noise with and without a penalty
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, images[torch.randint(len(images), (32,))]).mean().backward()
        optimizer.step()


def stand_still(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    """Steps in which nothing but an attached penalty moves the model."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()


class TwoTasks:
    """A network that has learnt the first of two tasks by SGD."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model, shape = NETWORKS[name]()
        first, self.second = (torch.randn(1, *shape).sign() + 0.2 * torch.randn(256, *shape) for _ in range(2))
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=LR)
        learn(self.sgd, self.model, first, 300)
        self.batches = first.split(64)
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def rank_1(self, terms: int) -> ck.LowRankHistory:
        """The task's direction; of more terms, each along nearly the same direction, with a curvature of its own."""
        fisher = ck.estimate_fisher(self.model, losses, self.batches)
        history = ck.LowRankHistory(self.model)
        u = fisher.layout.split(fisher.directions[0])
        numel = sum(part.numel() for part in u.values())
        for k in range(terms):
            noise = random_like(self.anchor, k)
            near = {name: (part + 0.1 * k * noise[name] / numel**0.5)[None] for name, part in u.items()}
            history.append(ck.LowRankFisher(near, fisher.curvatures / (1 + k), self.anchor))
        return history

    def move(self, scale: float, direction: dict[str, Tensor]) -> None:
        """To the anchor, plus ``scale`` times a direction."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.anchor[name] + scale * direction[name])


def weighted_drift(history: ck.LowRankHistory | ck.DiagonalHistory) -> float:
    """sqrt(sum_k a_k drift_k^2) or sqrt(sum_j S_j d_j^2), for one task: |drift|, up to a factor, of one direction."""
    return float((2 * history.penalty(1.0).detach()).sqrt())


pytestmark = pytest.mark.filterwarnings("ignore:only .* of the trace", "ignore:the mean gradient is mostly noise")
OVER_NETWORKS = pytest.mark.parametrize("network", NETWORKS)
TERMS = pytest.mark.parametrize("terms", [1, 3])


@OVER_NETWORKS
@MODES
@TERMS
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_penalty_alone_halves_the_drift_strength_times(network, decoupled, terms, strength):
    tasks = TwoTasks(network)
    history = tasks.rank_1(terms)
    tasks.move(1.0, history.directions()[0])
    before = weighted_drift(history)
    history.attach(tasks.sgd, history.suggest_lam(LR, STEPS, strength), decoupled=decoupled)
    stand_still(tasks.sgd, tasks.model, STEPS)
    tolerance = (strength * math.log(2)) ** 2 / (2 * STEPS) if terms == 1 else 0.03
    assert weighted_drift(history) / before == pytest.approx(0.5**strength, rel=1.1 * tolerance)


@OVER_NETWORKS
@MODES
@TERMS
def test_a_displacement_halves_while_the_next_task_is_learnt(network, decoupled, terms):
    """Compared with the same steps from the same place without the penalty, which drift by themselves, too."""
    tasks = TwoTasks(network)
    history = tasks.rank_1(terms)
    ends = []
    for lam in (0.0, history.suggest_lam(LR, STEPS)):
        tasks.move(1.0, history.directions()[0])
        history.attach(tasks.sgd, lam, decoupled=decoupled)
        learn(tasks.sgd, tasks.model, tasks.second, STEPS)
        history.detach()
        ends.append(float(history.drift()[0]))
    assert ends[1] / ends[0] == pytest.approx(0.5, abs=0.08)


@MODES
@pytest.mark.parametrize(("strength", "share"), [(1.0, 0.72), (10.0, 0.14)])
def test_a_drift_at_a_constant_pace_ends_at_a_share_of_what_it_would_be(decoupled, strength, share):
    model = nn.Linear(6, 3, dtype=torch.float64)
    history = history_of(model, "low_rank", tasks=1)
    history.decoupled_step_(float("inf"), LR)  # to drift 0
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    history.attach(sgd, history.suggest_lam(LR, 1000, strength), decoupled=decoupled)
    for _ in range(1000):
        for p, u in zip(model.parameters(), history.directions()[0].values(), strict=True):
            p.grad = -u.clone()
        sgd.step()
    expected = (1 - 2**-strength) / (strength * math.log(2))
    assert expected == pytest.approx(share, abs=0.005)
    assert float(history.drift()) == pytest.approx(expected * 1000 * LR, rel=5e-3)


@OVER_NETWORKS
@MODES
def test_what_a_task_has_moved_by_sgd_halves_by_the_diagonals_measure(network, decoupled):
    tasks = TwoTasks(network)
    history = ck.DiagonalHistory(tasks.model)
    history.append(ck.estimate_fisher(tasks.model, losses, tasks.batches, kind="diagonal"))
    learn(tasks.sgd, tasks.model, tasks.second, STEPS)
    before = weighted_drift(history)
    history.attach(tasks.sgd, history.suggest_lam(LR, STEPS), decoupled=decoupled)
    stand_still(tasks.sgd, tasks.model, STEPS)
    assert weighted_drift(history) / before == pytest.approx(0.5, abs=0.05)


# Which curvature, and which numbers


@settings(max_examples=50, deadline=None)
@given(
    curvatures=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-6, 1.0),
    steps=st.integers(1, 10_000),
    strength=st.floats(0.01, 100.0),
)
def test_the_curvature_is_the_mean_of_the_penaltys_weighted_by_themselves(curvatures, seed, lr, steps, strength):
    """tr H^2 / tr H of the Hessian H that autograd computes."""
    model = nn.Linear(3, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = [random_like(trainable(model), generator) for _ in curvatures]
    low_rank, diagonal = ck.LowRankHistory(model), ck.DiagonalHistory(model)
    for a, row in zip(curvatures, rows, strict=True):
        named = {name: part[None] for name, part in row.items()}
        low_rank.append(ck.LowRankFisher(named, torch.tensor([a]), rows[0]))
        diagonal.append(ck.DiagonalFisher({name: a * part.square() for name, part in row.items()}, rows[0]))
    names, params = zip(*model.named_parameters(), strict=True)
    for history in (low_rank, diagonal):
        flat = torch.cat([p.detach().flatten() for p in params])

        def penalty(flat: Tensor, history=history) -> Tensor:
            parts = flat.split([p.numel() for p in params])
            tensors = {n: x.view_as(p) for n, x, p in zip(names, parts, params, strict=True)}
            if history is diagonal:
                return ck.diagonal_ewc_penalty(
                    list(tensors.values()),
                    lam=1.0,
                    fisher_diagonal=[history.state_dict()[f"fisher_diagonal.{n}"] for n in names],
                    anchor=[history.state_dict()[f"anchor.{n}"] for n in names],
                )
            terms = zip(history.curvatures, history.directions(), history.anchor_projections, strict=True)
            return sum(
                ck.rank1_ewc_penalty(
                    list(tensors.values()), lam=1.0, direction=list(u.values()), curvature=a, anchor_projection=b
                )
                for a, u, b in terms
            )

        hessian = torch.autograd.functional.hessian(penalty, flat)
        curvature = float(hessian.square().sum() / hessian.trace())
        expected = strength * math.log(2) / (lr * steps * curvature)
        assert history.suggest_lam(lr, steps, strength) == pytest.approx(expected, rel=1e-6)


def test_one_term_agrees_with_the_stiffness():
    history = history_of(nn.Linear(6, 3), "low_rank", tasks=1)
    assert history.stiffness(history.suggest_lam(0.1, 50), 0.1) == pytest.approx(math.log(2) / 50, rel=1e-12)


@KINDS
def test_the_rate_may_be_a_number_a_tensor_or_an_optimizers_groups(kind):
    model = nn.Linear(6, 3)
    history = history_of(model, kind)
    expected = history.suggest_lam(0.25, 10)
    groups = [{"params": [model.weight], "lr": 0.01}, {"params": [model.bias], "lr": 0.25}]
    other = {"params": [nn.Parameter(torch.zeros(2))], "lr": 9.0}  # nothing that the history has
    for lr in (torch.tensor(0.25), torch.optim.SGD(model.parameters(), lr=0.25).param_groups, [*groups, other]):
        assert history.suggest_lam(lr, 10) == expected
    assert type(history.suggest_lam(torch.tensor(0.25), 10)) is float


@KINDS
def test_moved_copied_loaded_and_rebound_histories_suggest_the_same(kind, tmp_path):
    model = nn.Linear(6, 3)
    history = history_of(model, kind)
    expected = history.suggest_lam(0.1, 10)
    history.save(tmp_path / "h.safetensors")
    assert type(history).load(tmp_path / "h.safetensors", model).suggest_lam(0.1, 10) == pytest.approx(expected)
    assert copy.deepcopy((model, history))[1].suggest_lam(0.1, 10) == expected
    grown = nn.Linear(6, 5)
    history.rebind(grown, grown=["weight", "bias"])
    assert history.to("cpu").suggest_lam(0.1, 10) == pytest.approx(expected)


@KINDS
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 10), ValueError, r"lr is 0.0; expected a finite value above 0"),
        ((-0.1, 10), ValueError, r"lr is -0.1; expected a finite value >= 0"),
        ((float("nan"), 10), ValueError, "lr is nan"),
        ((float("inf"), 10), ValueError, "lr is inf"),
        (("fast", 10), TypeError, "lr is a str; expected a float, a 0-dim tensor or optimizer.param_groups"),
        (([{"params": [], "lr": 0.1}], 10), ValueError, "are in no parameter group"),
        ((0.1, 0), ValueError, r"steps is 0; expected an integer >= 1"),
        ((0.1, 10.0), ValueError, r"steps is 10.0; expected an integer >= 1"),
        ((0.1, True), ValueError, "steps is True; expected an integer"),
        ((0.1, 10, 0.0), ValueError, r"strength is 0.0; expected a finite value above 0"),
        ((0.1, 10, float("inf")), ValueError, "strength is inf; expected a finite value"),
        ((0.1, 10, "strong"), TypeError, "strength is a str"),
        ((1e-320, 1), ValueError, "for which lam would be inf; expected a finite lam above 0"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(kind, arguments, error, message):
    history = history_of(nn.Linear(6, 3), kind)
    with pytest.raises(error, match=message) as raised:
        history.suggest_lam(*arguments)
    assert "\n" not in str(raised.value)


@KINDS
def test_a_history_that_holds_nothing_has_no_lam(kind):
    model = nn.Linear(6, 3)
    history = history_of(model, kind, tasks=0)
    with pytest.raises(
        ValueError, match="the history has no tasks, so there is nothing to hold; append a Fisher first"
    ):
        history.suggest_lam(0.1, 10)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    if kind == "diagonal":
        history.append(ck.DiagonalFisher(zeros, zeros))
    else:
        history.append(ck.LowRankFisher({n: x[None] + 1 for n, x in zeros.items()}, torch.zeros(1), zeros))
    with pytest.raises(ValueError, match="curvatures are all 0, so its penalty is 0 at every lam"):
        history.suggest_lam(0.1, 10)


def test_an_optimizer_without_a_rate_is_refused():
    model = nn.Linear(6, 3)
    with pytest.raises(TypeError, match="the decoupled step and suggest_lam need a number"):
        history_of(model, "low_rank").suggest_lam([{"params": list(model.parameters()), "lr": None}], 10)
