"""Histories: their formulas, their binding to a model, their files."""

import math

import pytest
import torch
from helpers.past_tasks import flat, random_like, trainable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import crl_kernels as ck
from crl_kernels.backends.int8 import Int8Vector, scales_shape


class Net(nn.Module):
    """Ragged shapes: a 0-dim and an empty parameter, a frozen one, a non-contiguous one, and one that is shared."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 5)
        self.third = nn.Linear(5, 5)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.randn(0, 3))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.third(self.second(self.first(x)))


class Reversed(nn.Module):
    """The parameters of Net under the same names, registered in the opposite order."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        for name, child in reversed(list(net.named_children())):
            self.add_module(name, child)
        for name, parameter in reversed(list(net.named_parameters(recurse=False))):
            self.register_parameter(name, parameter)


def low_rank_fisher(model: nn.Module, seed: int, **options) -> ck.LowRankFisher:
    params = trainable(model)
    return ck.LowRankFisher.from_mean_gradient(
        random_like(params, seed), 0.5 + seed, random_like(params, seed + 100), **options
    )


def diagonal_fisher(model: nn.Module, seed: int) -> ck.DiagonalFisher:
    params = trainable(model)
    diagonal = {name: g.square() for name, g in random_like(params, seed).items()}
    return ck.DiagonalFisher(diagonal, random_like(params, seed + 100))


def low_rank_history(model: nn.Module, tasks: int = 3, **options) -> ck.LowRankHistory:
    history = ck.LowRankHistory(model)
    for seed in range(tasks):
        history.append(low_rank_fisher(model, seed, **options))
    return history


def diagonal_history(model: nn.Module, tasks: int = 3) -> ck.DiagonalHistory:
    history = ck.DiagonalHistory(model)
    for seed in range(tasks):
        history.append(diagonal_fisher(model, seed))
    return history


def double_dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return sum(((a[name].double() * b[name].double()).sum() for name in a), torch.zeros((), dtype=torch.float64))


def expected_low_rank(history: ck.LowRankHistory, params: dict[str, Tensor], lam: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for u, a, b in zip(history.directions(), history.curvatures, history.anchor_projections, strict=True):
        total = total + a * (double_dot(u, params) - b) ** 2
    return lam / 2 * total


def expected_diagonal(fishers: list[tuple[dict, dict]], params: dict[str, Tensor], lam: float) -> Tensor:
    return sum(
        lam / 2 * (f[name].double() * (params[name].double() - m[name].double()) ** 2).sum()
        for f, m in fishers
        for name in f
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, "mixed"])
def test_low_rank_value_and_gradient_equal_the_formula(dtype):
    model = Net(dtype=torch.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        model.first.double()
        model.conv.bfloat16()
    history = low_rank_history(model)
    params = {name: p.detach().double().requires_grad_() for name, p in trainable(model).items()}
    expected = expected_low_rank(history, params, 3.0)
    gradients = torch.autograd.grad(expected, list(params.values()))
    value = ck.rank1_ewc_penalty(history, lam=3.0)
    assert value.dtype == (torch.float64 if dtype in (torch.float64, "mixed") else torch.float32)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    value.backward()
    for p, gradient in zip(trainable(model).values(), gradients, strict=True):
        assert p.grad.dtype == p.dtype
        tolerance = 2**-8 if p.dtype == torch.bfloat16 else 1e-6
        assert float((p.grad.double() - gradient).norm()) <= tolerance * float(gradient.norm())
    assert model.frozen.grad is None


@pytest.mark.parametrize("where", ["at an anchor", "near it", "far from it"])
def test_diagonal_history_equals_the_sum_over_separate_tasks(where):
    model = Net()
    params = trainable(model)
    tasks = [
        ({n: g.square() for n, g in random_like(params, seed).items()}, random_like(params, seed + 100))
        for seed in range(4)
    ]
    history = ck.DiagonalHistory(model)
    for task in tasks:
        history.append(ck.DiagonalFisher(*task))
    distance = {"at an anchor": 0.0, "near it": 1e-4, "far from it": 100.0}[where]
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tasks[-1][1][name] + distance * torch.randn_like(p))
    named = {name: p.detach().double().requires_grad_() for name, p in params.items()}
    expected = expected_diagonal(tasks, named, 5.0)
    value = ck.diagonal_ewc_penalty(history, lam=5.0)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    value.backward()
    actual = torch.cat([p.grad.flatten() for p in params.values()]).double()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(named.values()))])
    assert float((actual - gradient).norm() / gradient.norm()) <= 1e-6


def test_diagonal_history_of_one_task_is_exact_at_its_anchor():
    model = Net()
    history = ck.DiagonalHistory(model)
    history.append(ck.DiagonalFisher({n: torch.ones_like(p) for n, p in trainable(model).items()}, trainable(model)))
    assert ck.diagonal_ewc_penalty(history, lam=1e6).item() == 0.0


def test_from_mean_gradient_equals_the_papers_formula_on_a_real_unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: trainer)")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=10,
    )
    params = dict(unet.named_parameters())
    x, t, label = torch.randn(16, 1, 8, 8), torch.randint(1000, (16,)), torch.randint(10, (16,))
    loss = (unet(x, t, class_labels=label).sample - torch.randn_like(x)).square().mean()
    gradients = torch.autograd.grad(loss, list(params.values()))
    mu = dict(zip(params, gradients, strict=True))
    anchor = {name: p.detach().clone() for name, p in params.items()}
    c = 2.7
    history = ck.LowRankHistory(unet)
    history.append(ck.LowRankFisher.from_mean_gradient(mu, c, anchor))
    with torch.no_grad():
        for p in params.values():
            p.add_(1e-2 * torch.randn_like(p))
    value = ck.rank1_ewc_penalty(history, lam=15_000.0)
    value.backward()

    inner = sum((mu[name].double() * (p.detach().double() - anchor[name].double())).sum() for name, p in params.items())
    torch.testing.assert_close(value.double().detach(), 15_000.0 / 2 * c * inner**2, rtol=1e-6, atol=0)
    actual = torch.cat([p.grad.flatten() for p in params.values()]).double()
    expected = 15_000.0 * c * inner * torch.cat([mu[name].flatten() for name in params]).double()
    assert float((actual - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_penalty_is_that_of_the_stored_direction(storage_dtype):
    """At its own anchor the penalty of a rounded direction is zero, and b belongs to the rounded direction."""
    model = Net()
    params = trainable(model)
    anchor = {name: p.detach().clone() for name, p in params.items()}
    fisher = ck.LowRankFisher.from_mean_gradient(random_like(params, 0), 2.0, anchor, storage_dtype=storage_dtype)
    assert fisher.directions.dtype == (torch.float32 if storage_dtype == torch.int8 else storage_dtype)
    history = ck.LowRankHistory(model)
    history.append(fisher)
    assert float(ck.rank1_ewc_penalty(history, lam=1e9)) < 1e-15
    torch.testing.assert_close(
        fisher.anchor_projections[0], double_dot(history.directions()[0], anchor), rtol=1e-12, atol=0
    )


def test_a_tiny_mean_gradient_does_not_underflow():
    model = nn.Linear(3, 2)
    mu = {name: torch.full_like(p, 1e-30, dtype=torch.float64) for name, p in model.named_parameters()}
    fisher = ck.LowRankFisher.from_mean_gradient(mu, 1e60, dict(model.named_parameters()))
    torch.testing.assert_close(fisher.curvatures, torch.tensor([8.0], dtype=torch.float64))


BOTH_KINDS = pytest.mark.parametrize(
    ("make", "penalty"),
    [(low_rank_history, ck.rank1_ewc_penalty), (diagonal_history, ck.diagonal_ewc_penalty)],
    ids=["low_rank", "diagonal"],
)


@BOTH_KINDS
def test_an_empty_history_costs_nothing(make, penalty):
    model = Net()
    history = make(model, tasks=0)
    assert len(history) == 0
    assert float(penalty(history, lam=1.0)) == 0.0
    assert float(history.add_penalty_grad_(1.0)) == 0.0
    history.decoupled_step_(1.0, 0.1)
    assert all(p.grad is None for p in model.parameters())


@BOTH_KINDS
def test_the_order_of_parameters_and_wrappers_do_not_change_the_penalty(make, penalty, tmp_path, process_group):
    """Reversed registration, wrappers and parameter groups: names decide, never positions."""
    model = Net()
    history = make(model)
    expected = penalty(history, lam=2.0)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    history.save(tmp_path / "history.safetensors")

    def assert_same_penalty(renamed: nn.Module) -> None:
        model.zero_grad()
        loaded = type(history).load(tmp_path / "history.safetensors", renamed)
        value = penalty(loaded, lam=2.0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        value.backward()
        for name, p in trainable(model).items():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-6, atol=1e-7)

    assert_same_penalty(model)
    assert_same_penalty(Reversed(model))
    assert_same_penalty(torch.compile(model))
    assert_same_penalty(DistributedDataParallel(model))
    assert_same_penalty(DistributedDataParallel(torch.compile(model)))
    assert_same_penalty(torch.compile(DistributedDataParallel(model)))
    assert_same_penalty(torch.compile(Reversed(model)))

    # Fishers that were estimated on a wrapped or reordered model fit, too.
    fisher = low_rank_fisher if make is low_rank_history else diagonal_fisher
    straight, crossed = make(model, tasks=0), make(model, tasks=0)
    straight.append(fisher(model, 0))
    names = list(trainable(model))
    reordered = fisher(model, 0)
    vector = "directions" if make is low_rank_history else "fisher_diagonal"
    pieces = reordered.layout.split(getattr(reordered, vector))
    assert list(pieces) == names
    crossed.append(reordered_fisher(reordered, list(reversed(names))))
    torch.testing.assert_close(penalty(crossed, lam=2.0), penalty(straight, lam=2.0), rtol=1e-6, atol=0)


def reordered_fisher(fisher, names):
    """The same Fisher with its parameters in another order."""
    if isinstance(fisher, ck.LowRankFisher):
        directions = fisher.layout.split(fisher.directions)
        zero = {name: torch.zeros_like(directions[name][0]) for name in names}
        reordered = ck.LowRankFisher({name: directions[name] for name in names}, fisher.curvatures, zero)
        reordered.anchor_projections = fisher.anchor_projections
        return reordered
    diagonal, anchor = fisher.layout.split(fisher.fisher_diagonal), fisher.layout.split(fisher.anchor)
    return ck.DiagonalFisher({name: diagonal[name] for name in names}, {name: anchor[name] for name in names})


@BOTH_KINDS
def test_parameter_groups_do_not_change_the_gradient(make, penalty):
    """Decay and no-decay groups reorder parameters in the optimizer; the history does not look there."""
    results = []
    for grouped in (False, True):
        model = Net()
        history = make(model)
        params = list(trainable(model).values())
        groups = (
            [
                {"params": [p for p in reversed(params) if p.dim() > 1]},
                {"params": [p for p in reversed(params) if p.dim() <= 1]},
            ]
            if grouped
            else params
        )
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(3, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            history.add_penalty_grad_(0.01)
            optimizer.step()
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@BOTH_KINDS
def test_save_and_load_are_bitwise(make, penalty, tmp_path):
    model = Net()
    history = make(model)
    history.save(tmp_path / "a.safetensors")
    loaded = type(history).load(tmp_path / "a.safetensors", model)
    assert len(loaded) == len(history)
    assert loaded.nbytes == history.nbytes
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(penalty(loaded, lam=2.0), penalty(history, lam=2.0))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]

    target = make(Net(seed=1), tasks=1)
    target.load_state_dict(history.state_dict())
    torch.testing.assert_close(target.state_dict(), history.state_dict(), rtol=0, atol=0)
    others = {key: 2 * value for key, value in history.state_dict().items()}
    with pytest.raises(ValueError, match=r"the state lacks 'first.bias', which the model has"):
        target.load_state_dict({key: value for key, value in others.items() if not key.endswith("first.bias")})
    with pytest.raises(ValueError, match="the state lacks 'num_tasks'"):
        target.load_state_dict({key: value for key, value in others.items() if key != "num_tasks"})
    torch.testing.assert_close(target.state_dict(), history.state_dict(), rtol=0, atol=0)


def test_fishers_are_saved_and_loaded_bitwise(tmp_path):
    model = Net()
    low_rank = [low_rank_fisher(model, 1, storage_dtype=dtype) for dtype in (torch.bfloat16, torch.int8)]
    for fisher in (*low_rank, diagonal_fisher(model, 1)):
        fisher.save(tmp_path / "fisher.safetensors")
        loaded = ck.load_fisher(tmp_path / "fisher.safetensors")
        assert type(loaded) is type(fisher)
        assert loaded.layout == fisher.layout
        for name, value in vars(fisher).items():
            if isinstance(value, (Tensor, Int8Vector)):
                tensors = zip(
                    *([v] if isinstance(v, Tensor) else v for v in (getattr(loaded, name), value)), strict=True
                )
                assert all(got.dtype == want.dtype and torch.equal(got, want) for got, want in tensors)


def test_a_shared_parameter_is_found_under_any_of_its_names(tmp_path):
    model = Net()
    history = low_rank_history(model)
    assert "second.weight" in history.names
    assert "third.weight" not in history.names
    history.save(tmp_path / "history.safetensors")
    model_reversed = Reversed(model)  # here the first name of the shared weight is third.weight
    loaded = ck.LowRankHistory.load(tmp_path / "history.safetensors", model_reversed)
    assert "third.weight" in loaded.names
    torch.testing.assert_close(loaded.penalty(1.0), history.penalty(1.0), rtol=1e-6, atol=0)


def test_include_and_exclude(tmp_path):
    model = Net()
    assert ck.LowRankHistory(model, exclude=["first", "conv.bias"]).names == (
        "scale",
        "nothing",
        "second.weight",
        "second.bias",
        "third.bias",
        "conv.weight",
    )
    history = ck.LowRankHistory(model, include=["*.weight"], exclude=["conv"])
    assert history.names == ("first.weight", "second.weight")
    params = {name: p for name, p in trainable(model).items() if name in history.names}
    history.append(ck.LowRankFisher.from_mean_gradient(random_like(params, 0), 1.0, params))
    history.save(tmp_path / "history.safetensors")
    assert ck.LowRankHistory.load(tmp_path / "history.safetensors", model).names == history.names
    with pytest.raises(ValueError, match="exclude pattern 'head' matches none"):
        ck.LowRankHistory(model, exclude=["head"])


@pytest.mark.parametrize("lr", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("lam", [0.0, 1e-3, 1.0, 1e6])
@BOTH_KINDS
def test_decoupled_step_is_the_proximal_point(make, penalty, lam, lr):
    """theta' minimises |theta' - theta|^2 / (2 lr) + penalty: its gradient there is zero."""
    model = Net(dtype=torch.float64)
    history = make(model)
    params = list(trainable(model).values())
    before = torch.cat([p.detach().flatten() for p in params])
    history.decoupled_step_(lam, lr)
    after = torch.cat([p.detach().flatten() for p in params])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(history.penalty(lam), params)])
    residual = (after - before) / lr + gradient
    scale = (after - before).norm() / lr + gradient.norm() + 1e-300
    # The gradient is evaluated at a rounded theta', and lam a is its condition.
    assert float(residual.norm() / scale) <= 1e-6 * max(1.0, lr * lam)


def test_decoupled_step_with_infinite_lam_reaches_the_anchors():
    model = Net(dtype=torch.float64)
    low_rank, diagonal = low_rank_history(model), diagonal_history(model, tasks=1)
    low_rank.decoupled_step_(float("inf"), 0.1)
    assert float(low_rank.drift().abs().max()) < 1e-10
    diagonal.decoupled_step_(float("inf"), 0.1)
    assert float(diagonal.penalty(1.0)) < 1e-20
    # Identical directions whose anchors disagree: the weighted mean of the anchors.
    twice = ck.LowRankHistory(model)
    mu, params = random_like(trainable(model), 0), trainable(model)
    for shift in (0.0, 1.0):
        anchor = {name: p.detach() + shift for name, p in params.items()}
        twice.append(ck.LowRankFisher.from_mean_gradient(mu, 1.0, anchor))
    twice.decoupled_step_(float("inf"), 0.1)
    drift = twice.drift()
    torch.testing.assert_close(drift[0], -drift[1], rtol=1e-9, atol=1e-12)


def test_decoupled_step_without_rate_does_nothing():
    model = Net()
    for history in (low_rank_history(model), diagonal_history(model)):
        before = flat(model)
        history.decoupled_step_(float("inf"), 0.0)
        assert torch.equal(flat(model), before)


def test_decoupled_step_trains_where_the_gradient_mode_diverges():
    """Plain SGD at eta lam a = 200: the gradient mode overshoots and explodes, the proximal step contracts."""
    ends = {}
    for mode in ("gradient", "decoupled"):
        model = Net()
        params = trainable(model)
        history = ck.LowRankHistory(model)
        history.append(ck.LowRankFisher.from_mean_gradient(random_like(params, 0), 1.0, params))
        lam = 200 / (0.1 * float(history.curvatures[0]))
        optimizer = torch.optim.SGD(params.values(), lr=0.1)
        for step in range(30):
            optimizer.zero_grad()
            model(torch.randn(8, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if mode == "gradient":
                history.add_penalty_grad_(lam)
            optimizer.step()
            if mode == "decoupled":
                history.decoupled_step_(lam, 0.1)
        ends[mode] = float(history.drift().abs().max())
    assert ends["decoupled"] < 1e-2
    assert not ends["gradient"] < 1e6


def test_a_parameter_that_is_frozen_later_is_held_constant():
    model = Net()
    history = low_rank_history(model)
    model.first.weight.requires_grad_(False)
    history.add_penalty_grad_(1.0)
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None
    with pytest.raises(ValueError, match=r"'first.weight' no longer require"):
        history.decoupled_step_(1.0, 0.1)


def test_state_bytes():
    """4 or 2 bytes per parameter and term, 8 per parameter for the diagonal; no copy of the old parameters."""
    model = Net()
    numel = sum(p.numel() for p in trainable(model).values())
    scalars = 2 * 8
    assert low_rank_history(model, tasks=2).nbytes == 2 * (4 * numel + scalars)
    assert low_rank_history(model, tasks=2, storage_dtype=torch.bfloat16).nbytes == 2 * (2 * numel + scalars)
    blocks = sum(math.prod(scales_shape(p.shape)) for p in trainable(model).values())
    assert low_rank_history(model, tasks=2, storage_dtype=torch.int8).nbytes == 2 * (numel + 4 * blocks + scalars)
    assert diagonal_history(model, tasks=2).nbytes == 8 * numel + 8


@BOTH_KINDS
def test_a_parameter_that_is_replaced_resized_or_moved_is_noticed(make, penalty):
    model = Net()
    history = make(model)
    expected = penalty(history, lam=1.0)
    weight = model.first.weight

    model.first.weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(ValueError, match=r"'first.weight' is no longer the object"):
        penalty(history, lam=1.0)
    model.first.weight = weight
    torch.testing.assert_close(penalty(history, lam=1.0), expected)

    data = weight.data
    weight.data = torch.zeros(6, 7)
    with pytest.raises(ValueError, match=r"'first.weight' has shape \(6, 7\) now and had \(5, 7\)"):
        penalty(history, lam=1.0)
    weight.data = data

    history.to("meta")
    with pytest.raises(ValueError, match=r"Call history.to\(device\)"):
        penalty(history, lam=1.0)
