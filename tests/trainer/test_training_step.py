"""One optimization step against plain PyTorch written out here, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from crl_diffusion import loop
from crl_diffusion.diffusion import stream
from crl_diffusion.method import RunConfig
from torch import Tensor, nn

MakeRun = Callable[[RunConfig], loop.Run]
Short = Callable[..., RunConfig]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _second_task(run: loop.Run) -> None:
    """In float64, at the start of the second task, a little away from the first one's end."""
    run.model.double().eval()
    run.like = next(run.model.parameters())
    run.remember(run.stages[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    run.optimizer = loop.new_optimizer(run.model)
    run.stage, run.step = 1, 2


def _plain_gd_gradient(run: loop.Run, model: nn.Module) -> list[Tensor]:
    """Gradient of mean squared error on noise (real images) plus on the teacher's prediction (pool)."""
    config, seed = run.config, run.config.seed
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def noised(pixels: Tensor, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = stream(seed, purpose, 1, 2)
        t = torch.randint(1000, (len(pixels),), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator).double()
        clean = pixels.double() / 255 * 2 - 1
        a = abar[t].reshape(-1, 1, 1, 1)
        return a**0.5 * clean + (1 - a) ** 0.5 * noise, t, noise

    images = run.data.train.of((2, 3))
    order = torch.randperm(len(images.labels), generator=stream(seed, "epoch", 1, 0))[16:24]
    x, t, noise = noised(images.pixels[order], "noise")
    prediction = model(x, t, class_labels=images.labels[order]).sample
    loss = nn.functional.mse_loss(prediction, noise)

    pool = run.sources["pool"].images
    index = torch.randint(len(pool.labels), (config.replay_batch,), generator=stream(seed, "replay 0", 1, 2))
    x, t, _ = noised(pool.pixels[index], "replay noise 0")
    with torch.no_grad():
        assert run.teacher is not None
        target = run.teacher(x, t, class_labels=pool.labels[index]).sample
    loss = loss + nn.functional.mse_loss(model(x, t, class_labels=pool.labels[index]).sample, target)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _plain_step(model: nn.Module, gradient: list[Tensor], clip: float, lr: float) -> Tensor:
    """Clipped, first step of Adam: both moments, with their bias corrected, are the gradient and its square."""
    norm = _flat(gradient).norm()
    scale = min(1.0, clip / (float(norm) + 1e-6))
    parameters = list(model.parameters())
    return _flat([p - lr * (g * scale) / ((g * scale).abs() + 1e-8) for p, g in zip(parameters, gradient, strict=True)])


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_a_step_of_gd(short: Short, make_run: MakeRun, clip: float) -> None:
    run = make_run(short("gd", steps=20, clip=clip))
    _second_task(run)
    model = copy.deepcopy(run.model)
    lr = loop.one_cycle(2, 20, run.config.lr)
    run.take_step(run.data.train.of((2, 3)), run.stages[1])
    expected = _plain_step(model, _plain_gd_gradient(run, model), clip, lr)
    moved = (expected - _flat(list(model.parameters()))).norm()
    assert moved > 0
    assert (_flat(list(run.model.parameters())) - expected).norm() <= 1e-6 * moved


@pytest.mark.filterwarnings("ignore:(only .* of the trace of the Fisher|the mean gradient is mostly noise)")
def test_rank1_in_gradient_mode_adds_its_gradient_before_the_optimizer(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1", steps=20, clip=1e6, mode="gradient", lam=50.0))
    _second_task(run)
    assert run.penalty is not None
    model = copy.deepcopy(run.model)
    u, a, b = _direction(run)
    theta = _flat(list(model.parameters()))
    extra = 50.0 * a * (u @ theta - b) * u
    assert extra.norm() > 1e-3
    gradient = list(_plain_gd_gradient(run, model))
    sizes = [g.numel() for g in gradient]
    gradient = [g + e.view_as(g) for g, e in zip(gradient, extra.split(sizes), strict=True)]
    run.take_step(run.data.train.of((2, 3)), run.stages[1])
    expected = _plain_step(model, gradient, 1e6, loop.one_cycle(2, 20, run.config.lr))
    assert (_flat(list(run.model.parameters())) - expected).norm() <= 1e-6 * (expected - theta).norm()


@pytest.mark.filterwarnings("ignore:(only .* of the trace of the Fisher|the mean gradient is mostly noise)")
def test_rank1_decoupled_is_a_proximal_step_after_the_optimizer(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1", steps=20, clip=1e6, lam=1e4))
    _second_task(run)
    model = copy.deepcopy(run.model)
    u, a, b = _direction(run)
    lr = loop.one_cycle(2, 20, run.config.lr)
    theta = _plain_step(model, _plain_gd_gradient(run, model), 1e6, lr)
    pull = lr * 1e4 * a / (1 + lr * 1e4 * a) * (u @ theta - b) * u
    assert pull.norm() > 1e-6
    run.take_step(run.data.train.of((2, 3)), run.stages[1])
    assert (_flat(list(run.model.parameters())) - (theta - pull)).norm() <= 1e-6 * pull.norm()


def _direction(run: loop.Run) -> tuple[Tensor, float, float]:
    assert run.penalty is not None
    history = run.penalty.history
    (named,) = history.directions()
    u = _flat([named[name] for name, _ in run.model.named_parameters()]).double()
    return u, float(history.curvatures[0]), float(history.anchor_projections[0])


def test_the_learning_rate_rises_falls_and_never_leaves_its_range() -> None:
    rates = [loop.one_cycle(step, 100, 1e-3) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert 8 <= rates.index(max(rates)) <= 11
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[-1] < 1e-5
    assert loop.one_cycle(0, 1, 1e-3) > 0


def test_a_loss_that_is_not_finite_stops_with_its_step_and_a_cause(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", lr=1e-3))
    stage = run.stages[0]
    run.step = 6
    losses = [torch.tensor([1.0, 0.0]), torch.tensor([float("nan"), 0.0]), torch.tensor([float("inf"), 0.0])]
    with pytest.raises(loop.TrainingError, match=r"not finite at step 5 of stage 1; .*learning rate.*--lr"):
        loop.log_losses(run, stage, losses, 0.1, board=None)  # type: ignore[arg-type]
    stiff = make_run(short("rank1", mode="gradient", lam=1e9))
    stiff.step = 1
    with pytest.raises(loop.TrainingError, match=r"step 1 of stage 2; .*--lam 1e\+08 or --mode decoupled"):
        loop.log_losses(stiff, stiff.stages[1], [torch.tensor([float("nan"), 0.0])], 0.1, board=None)  # type: ignore[arg-type]
