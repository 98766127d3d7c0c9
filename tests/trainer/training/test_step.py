"""One optimization step of every kind of method against plain PyTorch written out here, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from crl_diffusion.config.curriculum import Stage
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.diffusion.noising import stream
from crl_diffusion.errors import TrainingError
from crl_diffusion.methods import penalties
from crl_diffusion.methods.optimizers import new_optimizer
from crl_diffusion.methods.replay import Guided
from crl_diffusion.training import loop
from crl_diffusion.training.run import Run
from crl_diffusion.training.step import one_cycle, training_step
from helpers.trainer_runs import MakeRun, Short
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

pytestmark = [  # from 24 samples: no wonder
    pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher"),
    pytest.mark.filterwarnings("ignore:the mean gradient .*is mostly noise"),
]
STEPS, STEP = 20, 2  # of a task, and the first that is looked at
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
# Weights of the real batch and of each replay in the third task.
REPLAYED = {
    "fine-tune": (1.0, []),
    "replay": (1.0, [("pool", "noise", 1.0)]),
    "gd": (1.0, [("pool", "teacher", 1.0)]),
    "replay+gd": (1.0, [("pool", "noise", 1.0), ("pool", "teacher", 1.0)]),
    "masip": (1 / 3, [("fresh", "teacher", 2 / 3)]),
    "ddgr": (1.0, [("guided", "noise", 1.0)]),
    "guided-gd": (1.0, [("guided", "teacher", 1.0)]),
}


# What an L2 penalty pulls towards, from the parameters that each task ended with.
L2_ANCHORS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "l2": lambda ends: ends[-1],
    "l2_average": lambda ends: sum(ends) / len(ends),  # type: ignore[arg-type,return-value]
}


class Learnt(NamedTuple):
    """A Fisher matrix, and the parameters that it was measured at. An L2 penalty has no Fisher matrix."""

    fisher: Any
    theta: Tensor


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _double(run: Run) -> list[Learnt]:
    """The run in float64; what its penalty learns is noted in the list."""
    run.model.double().eval()
    run.like = next(run.model.parameters())
    if isinstance(guided := run.sources.get("guided"), Guided):
        guided.guide.classifier.double()
    learnt: list[Learnt] = []
    if run.method.penalty is not None:
        run.penalty = penalties.PenaltyState(run.method.penalty, run.model)
        append = run.penalty.history.append

        def noted(fisher: Any) -> None:
            learnt.append(Learnt(fisher, _flat(run.model.parameters())))
            append(fisher)

        run.penalty.history.append = noted  # type: ignore[method-assign]
    return learnt


def _third_task(run: Run) -> list[Learnt]:
    """At a step of the third task, away from where the first two ended."""
    learnt, ends = _double(run), []
    generator = torch.Generator().manual_seed(0)
    for stage in run.stages[:2]:
        run.remember(stage)
        ends.append(_flat(run.model.parameters()))
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    run.optimizer = run.new_optimizer()
    run.stage, run.step = 2, STEP
    if run.method.penalty is not None and run.method.penalty.fisher in L2_ANCHORS:
        return [Learnt(None, theta) for theta in ends]
    return learnt


def _noised(seed: int, pixels: Tensor, purpose: str, stage: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = stream(seed, purpose, stage, step)
    t = torch.randint(1000, (len(pixels),), generator=generator)
    noise = torch.randn(pixels.shape, generator=generator).double()
    a = ABAR[t].reshape(-1, 1, 1, 1)
    return a**0.5 * (pixels.double() / 255 * 2 - 1) + (1 - a) ** 0.5 * noise, t, noise


def _drawn_anew(run: Run, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two DDIM steps of the teacher, at t = 500 and t = 0, as pixels."""
    assert run.teacher is not None
    old = torch.tensor([0, 1, 2, 3])
    label = old[torch.randint(4, (run.config.replay_batch,), generator=generator)]
    x = torch.randn(len(label), *run.data.shape, generator=generator).double()
    for t, following in ((500, float(ABAR[0])), (0, 1.0)):
        with torch.no_grad():
            noise = run.teacher(x, torch.full_like(label, t), class_labels=label)[0]
        clean = ((x - (1 - ABAR[t]) ** 0.5 * noise) / ABAR[t] ** 0.5).clamp(-1, 1)
        x = following**0.5 * clean + (1 - following) ** 0.5 * noise
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), label


def _plain_gradient(run: Run, model: nn.Module, name: str, stage: Stage, step: int = STEP) -> Tensor:
    """Of the weighted mean squared errors on real and on replayed images."""
    config, seed = run.config, run.config.seed
    weight, replays = REPLAYED[name]
    images = run.task_images(stage, "train")
    order = torch.randperm(len(images.labels), generator=stream(seed, "epoch", stage.number, 0))[8 * step :][:8]
    x, t, noise = _noised(seed, images.pixels[order], "noise", stage.number, step)
    loss = weight * nn.functional.mse_loss(model(x, t, class_labels=images.labels[order])[0], noise)
    for i, (source, target, weight) in enumerate(replays):
        generator = stream(seed, f"replay {i}", stage.number, step)
        if source in ("pool", "guided"):
            pool = run.sources[source].images  # type: ignore[attr-defined]
            index = torch.randint(len(pool.labels), (config.replay_batch,), generator=generator)
            pixels, label = pool.pixels[index], pool.labels[index]
        else:
            pixels, label = _drawn_anew(run, generator)
        x, t, wanted = _noised(seed, pixels, f"replay noise {i}", stage.number, step)
        if target == "teacher":
            assert run.teacher is not None
            with torch.no_grad():
                wanted = run.teacher(x, t, class_labels=label)[0]
        loss = loss + weight * nn.functional.mse_loss(model(x, t, class_labels=label)[0], wanted)
    return _flat(torch.autograd.grad(loss, list(model.parameters())))


def _clipped(gradient: Tensor, clip: float) -> Tensor:
    return gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6)) if clip else gradient


def _decaying_sum(decay: float, terms: Sequence[Tensor]) -> Tensor:
    """Each term is multiplied by `decay` once for each of those after it."""
    return torch.stack([decay**age * term for age, term in enumerate(reversed(terms))]).sum(0)


def _adam_denominator(gradients: Sequence[Tensor]) -> Tensor:
    """The square root of the average square, corrected for its start at 0, plus eps."""
    squares = _decaying_sum(0.999, [gradient**2 for gradient in gradients])
    return (0.001 * squares / (1 - 0.999 ** len(gradients))).sqrt() + 1e-8


def _direction(optimizer: str, gradients: Sequence[Tensor], squared: Sequence[Tensor] | None = None) -> Tensor:
    """What the optimizer multiplies by its learning rate after these gradients of its steps. `squared`: those that
    enter Adam's second moment, if they are others."""
    if optimizer == "sgd":
        return _decaying_sum(0.9, gradients)
    mean = 0.1 * _decaying_sum(0.9, gradients) / (1 - 0.9 ** len(gradients))
    return mean / _adam_denominator(gradients if squared is None else squared)


def _terms(run: Run, learnt: list[Learnt], slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u (K, P), a (K,) and b (K,) of all tasks; b from the parameters at the time, less s / a."""
    names = [name for name, _ in run.model.named_parameters()]
    assert run.penalty is not None
    u = torch.stack([_flat([term[name] for name in names]) for term in run.penalty.history.directions()]).double()  # type: ignore[union-attr]
    a = torch.cat([task.fisher.curvatures for task in learnt])
    theta = torch.cat([task.theta.expand(len(task.fisher.curvatures), -1) for task in learnt])
    b = (u * theta).sum(1)
    if slopes:
        b = b - torch.cat([task.fisher.slopes for task in learnt]) / a
    return u, a, b


def _pull(theta: Tensor, u: Tensor, a: Tensor, b: Tensor, strength: float) -> Tensor:
    """argmin_x |x - theta|^2 / 2 + strength / 2 sum a (u . x - b)^2, solved in an orthonormal basis of the u."""
    q, r = torch.linalg.qr(u.T)
    before = q.T @ theta
    after = torch.linalg.solve(torch.eye(len(a)) + strength * (r * a) @ r.T, before + strength * (r * a) @ b)
    return theta + q @ (after - before)


def _penalty_gradient(run: Run, learnt: list[Learnt], theta: Tensor) -> Tensor:
    spec = run.method.penalty
    assert spec is not None
    if spec.fisher in L2_ANCHORS:
        return spec.lam * (theta - L2_ANCHORS[spec.fisher]([task.theta for task in learnt]))
    if spec.fisher == "diagonal":
        pulls = [task.fisher.fisher_diagonal.double() * (theta - task.theta) for task in learnt]
        return spec.lam * torch.stack(pulls).sum(0)
    u, a, b = _terms(run, learnt, spec.slopes)
    return spec.lam * (a * (u @ theta - b)) @ u


def _proximal(run: Run, learnt: list[Learnt], theta: Tensor, lr: float) -> Tensor:
    """argmin_x |x - theta|^2 / 2 + lr penalty(x)"""
    spec = run.method.penalty
    assert spec is not None
    if spec.fisher in L2_ANCHORS:
        anchor = L2_ANCHORS[spec.fisher]([task.theta for task in learnt])
        return (theta + lr * spec.lam * anchor) / (1 + lr * spec.lam)
    if spec.fisher == "diagonal":
        curvature = sum(task.fisher.fisher_diagonal.double() for task in learnt)
        pulled = sum(task.fisher.fisher_diagonal.double() * task.theta for task in learnt)
        return (theta + lr * spec.lam * pulled) / (1 + lr * spec.lam * curvature)
    return _pull(theta, *_terms(run, learnt, spec.slopes), lr * spec.lam)


def _total_rate(config: RunConfig, task: int) -> float:
    """Sum of the learning rates of a task, from 0."""
    peak = config.lr * (config.lr_later if task else 1.0)
    return {"one-cycle": sum(one_cycle(step, STEPS, peak) for step in range(STEPS)), "constant": STEPS * peak}[
        config.lr_schedule
    ]


def _slopes_alone(run: Run, learnt: list[Learnt]) -> Tensor:
    """lam sum_k w_k s_k u_k; w_k has faded at the end of each task from the k-th on, with that task's rates."""
    config, spec = run.config, run.method.penalty
    assert spec is not None
    u, a, _ = _terms(run, learnt, slopes=False)
    weights = torch.ones_like(a)
    for number, task in enumerate(learnt):
        known = len(task.fisher.slopes) * (number + 1)
        weights[:known] /= 1 + spec.lam * _total_rate(config, number) * a[:known]
    return spec.lam * (weights * torch.cat([task.fisher.slopes for task in learnt])) @ u


def _expected(
    run: Run, learnt: list[Learnt], name: str, rates: Sequence[float], penalised: bool = True
) -> list[Tensor]:
    """Parameters after each of the steps that have these learning rates, the first of them STEP."""
    model, config = copy.deepcopy(run.model), run.config
    mode = run.method.penalty.mode if run.method.penalty is not None and penalised else None
    theta, gradients, squared, path = _flat(model.parameters()), [], [], []
    for step, lr in enumerate(rates, STEP):
        gradient = _plain_gradient(run, model, name, run.stages[2], step)
        if mode == "gradient":
            gradient = gradient + _penalty_gradient(run, learnt, theta)
        gradients.append(_clipped(gradient, config.clip))
        squared.append(gradients[-1])
        if mode == "damping":
            squared[-1] = (gradients[-1] ** 2 + _penalty_gradient(run, learnt, theta) ** 2).sqrt()
        theta = theta - lr * _direction(config.optimizer, gradients, squared)
        if mode == "decoupled":
            theta = _proximal(run, learnt, theta, lr)
        elif mode == "preconditioned":
            theta = theta - lr * _penalty_gradient(run, learnt, theta) / _adam_denominator(gradients)
        elif mode == "alone":
            theta = theta - lr * _slopes_alone(run, learnt)
        path.append(theta)
        vector_to_parameters(theta, model.parameters())
    return path


def _lr(schedule: str, peak: float, step: int = STEP) -> float:
    """The step lies beyond the rise of one-cycle, which is a tenth of the steps."""
    rise = STEPS // 10
    shape = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - rise) / (STEPS - rise), dtype=torch.float64)).item())
    return peak * {"one-cycle": shape, "constant": 1.0}[schedule]


def _check(run: Run, name: str, schedule: str, steps: int = 1) -> None:
    """Compares parameters after each step of the third task, from STEP on, with those of plain PyTorch."""
    learnt = _third_task(run)
    theta = _flat(run.model.parameters())
    rates = [_lr(schedule, run.config.lr * run.config.lr_later, STEP + i) for i in range(steps)]
    path, free_path = (_expected(run, learnt, name, rates, penalised) for penalised in (True, False))
    for expected, free in zip(path, free_path, strict=True):
        run.take_step(run.data.train.of_classes((4, 5)), run.stages[2])
        actual = _flat(run.model.parameters())
        assert (expected - theta).norm() > 0
        assert (actual - expected).norm() <= 1e-8 * (expected - theta).norm()
        if run.method.penalty is not None:
            assert (actual - expected).norm() <= 1e-6 * (expected - free).norm()  # the penalty's own share, that is


@pytest.mark.parametrize(("clip", "schedule"), [(0.05, "one-cycle"), (0.0, "constant")])
@pytest.mark.parametrize("name", REPLAYED)
def test_a_step_without_a_penalty_is_that_of_plain_pytorch(
    short: Short, make_run: MakeRun, name: str, clip: float, schedule: str
) -> None:
    run = make_run(short(name, model="mini", tasks=3, steps=STEPS, clip=clip, lr_schedule=schedule))
    _check(run, name, schedule)


@pytest.mark.parametrize(
    ("mode", "clip", "schedule"), [("gradient", 0.05, "constant"), ("decoupled", 0.0, "one-cycle")]
)
@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        ("fine-tune", "diagonal:lam=3000"),
        ("gd", "diagonal:lam=3000"),
        ("fine-tune", "rank1:lam=50"),
        ("gd", "rank1:slopes,lam=50"),
        ("replay+gd", "rank1:top,lam=50"),
        ("masip", "rank3:lam=50"),
        ("ddgr", "rank1:lam=50"),
        ("guided-gd", "diagonal:lam=3000"),
        ("gd", "rank3:slopes,lam=50"),
        ("replay", "bands2:lam=50"),
        ("gd", "bands2:top,slopes,lam=50"),
        ("gd", "rank3:random,slopes,lam=50"),
        ("fine-tune", "l2:lam=5"),
        ("gd", "l2:lam=5"),
        ("masip", "l2-average:lam=5"),
        ("replay", "l2-average:lam=5"),
    ],
)
def test_a_step_with_a_penalty_is_that_of_plain_pytorch(
    short: Short, make_run: MakeRun, name: str, penalty: str, mode: str, clip: float, schedule: str
) -> None:
    method = f"{penalty},{mode}" if name == "fine-tune" else f"{name}+{penalty},{mode}"
    settings = {"model": "mini", "tasks": 3, "steps": STEPS, "clip": clip, "lr_schedule": schedule}
    _check(make_run(short(method, fisher_samples=24, **settings)), name, schedule)


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [
        ("sgd", "fine-tune"),
        ("sgd", "gd"),
        ("sgd", "diagonal:gradient,lam=3000"),
        ("sgd", "gd+rank1:top,gradient,lam=50"),
        ("sgd", "gd+diagonal:lam=3000"),
        ("sgd", "bands2:slopes,lam=50"),
        ("sgd", "l2-average:gradient,lam=5"),
        ("adam", "gd+l2:lam=5"),
        ("adam", "gd"),
        ("adam", "gd+rank1:random,gradient,lam=50"),
        ("adam", "rank3:slopes,lam=50"),
        ("adam", "gd+rank1:preconditioned,lam=0.05"),
        ("adam", "rank3:slopes,preconditioned,lam=0.05"),
        ("adam", "diagonal:preconditioned,lam=0.05"),
        ("adam", "gd+rank1:damping,lam=50"),
        ("adam", "gd+rank3:slopes,signs,damping,lam=50"),
        ("adam", "diagonal:damping,lam=3000"),
    ],
)
@pytest.mark.parametrize(("clip", "schedule"), [(0.05, "one-cycle"), (0.0, "constant")])
def test_consecutive_steps_are_those_of_plain_pytorch(
    short: Short, make_run: MakeRun, optimizer: str, method: str, clip: float, schedule: str
) -> None:
    settings = {"optimizer": optimizer, "lr": {"adam": 2e-3, "sgd": 0.2}[optimizer], "lr_schedule": schedule}
    run = make_run(short(method, model="mlp", tasks=3, steps=STEPS, clip=clip, fisher_samples=24, **settings))
    _check(run, "gd" if method.startswith("gd") else "fine-tune", schedule, steps=3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gd+rank1:lam=50", {"optimizer": "sgd", "lr": 0.2}),
        ("gd+rank1:gradient,lam=50", {"optimizer": "sgd", "lr": 0.2}),
        ("gd+rank1:preconditioned,lam=0.05", {}),
    ],
)
def test_consecutive_steps_of_a_unet_are_those_of_plain_pytorch(
    short: Short, make_run: MakeRun, method: str, settings: dict[str, Any]
) -> None:
    run = make_run(short(method, model="mini", tasks=3, steps=STEPS, fisher_samples=24, **settings))
    _check(run, "gd", "one-cycle", steps=2)


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
@pytest.mark.parametrize("method", ["gd", "gd+rank1:lam=50", "gd+bands2:slopes,alone,lam=3000"])
def test_a_step_of_a_later_task_has_its_share_of_the_learning_rate(
    short: Short, make_run: MakeRun, method: str, schedule: str
) -> None:
    settings = {"model": "mlp", "tasks": 3, "steps": STEPS, "fisher_samples": 24, "lr_schedule": schedule}
    _check(make_run(short(method, lr_later=0.1, **settings)), "gd", schedule)

    first, second = (make_run(short(method, lr_later=share, **settings)) for share in (0.1, 1.0))
    for run in (first, second):
        run.take_step(run.task_images(run.stages[0], "train"), run.stages[0])
    assert torch.equal(_flat(first.model.parameters()), _flat(second.model.parameters()))


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
def test_what_is_learnt_of_a_task_comes_with_the_sum_of_its_learning_rates(
    short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    run = make_run(short("rank1", model="mlp", tasks=3, steps=STEPS, lr=0.01, lr_later=0.25, lr_schedule=schedule))
    totals: list[float] = []

    def learn(loss: Any, batches: Any, generator: Any, task_lr: float) -> dict[str, Any]:
        totals.append(task_lr)
        return {}

    monkeypatch.setattr(run.penalty, "learn", learn)
    for stage in run.stages:
        run.remember(stage)
    if schedule == "constant":
        assert totals == pytest.approx([0.2, 0.05, 0.05], rel=1e-12)
    else:
        rates = [_lr(schedule, 0.01, step) for step in range(2, STEPS)]
        first = 0.01 * (0.5 + 1.0) + sum(rates)  # the rise: half of the peak, then the peak
        assert totals == pytest.approx([first, first / 4, first / 4], rel=1e-12)


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
def test_the_average_beside_a_penalty_in_the_gradient_is_that_of_its_formula(
    short: Short, make_run: MakeRun, schedule: str
) -> None:
    """At steps 3 to 6 of the task n / (n + 9) is 0.25, 0.31, 0.36 and 0.4: below the decay of 0.35, and above."""
    method = "gd+rank1:gradient,slopes,lam=50"
    settings = {"model": "mlp", "tasks": 3, "steps": STEPS, "fisher_samples": 24, "lr_schedule": schedule}
    run = make_run(short(method, ema=0.35, **settings))
    learnt = _third_task(run)
    average = start = _flat(run.model.parameters())
    path = _expected(run, learnt, "gd", [_lr(schedule, run.config.lr, step) for step in range(STEP, STEP + 4)])
    for n, theta in enumerate(path, STEP + 1):
        run.take_step(run.data.train.of_classes((4, 5)), run.stages[2])
        assert (_flat(run.model.parameters()) - theta).norm() <= 1e-8 * (theta - start).norm()
        decay = min(0.35, n / (n + 9))
        average = decay * average + (1 - decay) * theta
    assert run.average is not None
    kept = [run.average[name].clone() for name, _ in run.model.named_parameters()]
    assert (_flat(kept) - average).norm() <= 1e-8 * (average - start).norm()
    run.adopt_average()
    for p, value in zip(run.model.parameters(), kept, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("direction", ["mean", "top", "random"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_directions_of_equal_curvature_and_strength_pull_equally_in_the_gradient(
    short: Short, make_run: MakeRun, optimizer: str, direction: str
) -> None:
    """With lam * a = 7 and a drift of 0.3 along the unit direction u, the gradient has 2.1 u added to it."""
    settings = {"model": "mlp", "steps": STEPS, "clip": 0.0, "fisher_samples": 24, "optimizer": optimizer}
    run = make_run(short(f"rank1:{direction},gradient", **settings))
    learnt = _double(run)
    run.remember(run.stages[0])
    (u,), (a,), _ = _terms(run, learnt, slopes=False)
    assert float(u.norm()) == pytest.approx(1, rel=1e-6)
    assert run.penalty is not None
    run.penalty.spec = replace(run.penalty.spec, lam=7 / float(a))
    theta = learnt[0].theta + 0.3 * u / (u @ u)  # random ones are of length 1 in float32
    vector_to_parameters(theta.clone(), run.model.parameters())
    run.optimizer, run.stage, run.step = run.new_optimizer(), 1, STEP
    gradient, lr = _plain_gradient(run, run.model, "fine-tune", run.stages[1]), _lr("one-cycle", run.config.lr)
    free, expected = (theta - lr * _direction(optimizer, [gradient + pull * u]) for pull in (0.0, 2.1))
    run.take_step(run.task_images(run.stages[1], "train"), run.stages[1])
    error = (_flat(run.model.parameters()) - expected).norm()
    assert error <= 1e-8 * (expected - theta).norm()
    assert error <= 1e-6 * (expected - free).norm()


@pytest.mark.parametrize("method", ["gd+rank1:preconditioned,lam=0.05", "diagonal:preconditioned,lam=0.05"])
def test_adams_moments_never_see_a_preconditioned_penalty(short: Short, make_run: MakeRun, method: str) -> None:
    runs = [make_run(short(method, model="mlp", tasks=3, steps=STEPS, fisher_samples=24)) for _ in range(2)]
    for run in runs:
        _third_task(run)
    penalised, free = runs
    free.penalty = None
    first, second = (run.take_step(run.task_images(run.stages[2], "train"), run.stages[2]) for run in runs)
    assert torch.equal(first, second)  # losses, and the norm of the gradient
    assert not torch.equal(_flat(penalised.model.parameters()), _flat(free.model.parameters()))
    for p, q in zip(penalised.model.parameters(), free.model.parameters(), strict=True):
        state, expected = penalised.optimizer.state[p], free.optimizer.state[q]
        assert state.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in expected.items():
            assert torch.equal(state[name], value), name


def test_a_damping_penalty_enters_the_second_moment_only(short: Short, make_run: MakeRun) -> None:
    runs = [make_run(short("gd+rank1:damping,lam=50", model="mlp", tasks=3, steps=STEPS, fisher_samples=24))]
    runs.append(make_run(runs[0].config))
    for run in runs:
        _third_task(run)
    penalised, free = runs
    free.penalty = None
    first, second = (run.take_step(run.task_images(run.stages[2], "train"), run.stages[2]) for run in runs)
    assert torch.equal(first, second)  # losses, and the norm of the gradient
    for p, q in zip(penalised.model.parameters(), free.model.parameters(), strict=True):
        state, expected = penalised.optimizer.state[p], free.optimizer.state[q]
        assert torch.equal(state["exp_avg"], expected["exp_avg"])
        assert (state["exp_avg_sq"] >= expected["exp_avg_sq"]).all()
        assert not torch.equal(state["exp_avg_sq"], expected["exp_avg_sq"])


def test_the_logged_loss_of_real_images_is_their_unweighted_mean(short: Short, make_run: MakeRun) -> None:
    losses = []
    for name in ("gd", "masip"):
        run = make_run(short(name, model="mini", tasks=3, steps=STEPS))
        _third_task(run)
        losses.append(run.take_step(run.task_images(run.stages[2], "train"), run.stages[2])[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["rank1:slopes,alone,lam=50", "gd+bands2:slopes,alone,lam=3000"])
def test_a_step_with_the_slopes_alone_is_that_of_plain_pytorch(short: Short, make_run: MakeRun, method: str) -> None:
    run = make_run(short(method, model="mini", tasks=3, steps=STEPS, fisher_samples=24))
    _check(run, "gd" if method.startswith("gd") else "fine-tune", "one-cycle")


def test_slopes_alone_continue_from_a_saved_state(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("bands2:slopes,alone,lam=50", model="mini", tasks=3, steps=STEPS, fisher_samples=24))
    _third_task(run)
    assert run.penalty is not None
    model = copy.deepcopy(run.model)
    before = _flat(model.parameters())
    restored = penalties.PenaltyState(run.penalty.spec, model)
    restored.load_state(run.penalty.state())
    for penalty in (run.penalty, restored):
        penalty.after_step(1e-3, run.optimizer)
    assert not torch.equal(_flat(model.parameters()), before)
    assert torch.equal(_flat(model.parameters()), _flat(run.model.parameters()))
    saved = run.penalty.state()
    with pytest.raises(ValueError, match="1 slopes and 4 terms"):
        restored.load_state({**saved, penalties.SLOPES_ALONE: torch.ones(1)})
    with pytest.raises(KeyError, match=penalties.SLOPES_ALONE):
        restored.load_state({name: value for name, value in saved.items() if name != penalties.SLOPES_ALONE})


def test_a_step_of_joint_training_is_one_of_fine_tuning_on_all_classes(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("joint", model="mini", tasks=3, steps=STEPS, clip=0.0, lr_schedule="constant"))
    _double(run)
    (stage,) = run.stages
    model = copy.deepcopy(run.model)
    run.step = STEP
    gradient = _plain_gradient(run, model, "fine-tune", stage)
    expected = _flat(model.parameters()) - run.config.lr * _direction("adam", [gradient])
    run.take_step(run.task_images(stage, "train"), stage)
    moved = (expected - _flat(model.parameters())).norm()
    assert (_flat(run.model.parameters()) - expected).norm() <= 1e-8 * moved


@pytest.mark.parametrize("method", ["rank1:once,slopes,lam=3", "gd+bands2:once,slopes,lam=3"])
def test_mode_once_pulls_at_the_end_of_a_task_and_never_in_steps(short: Short, make_run: MakeRun, method: str) -> None:
    run = make_run(short(method, model="mini", tasks=3, steps=STEPS, fisher_samples=24, clip=0.0))
    learnt = _double(run)
    before = _flat(run.model.parameters())
    run.remember(run.stages[0])
    after = _flat(run.model.parameters())
    (task,) = learnt  # appended after the pull, but measured before it
    u, a, b = _terms(run, [task._replace(theta=before)], slopes=True)
    rates = [one_cycle(step, STEPS, run.config.lr) for step in range(STEPS)]
    expected = _pull(before, u, a, b, 3 * sum(rates))
    assert (expected - before).norm() > 0
    assert (after - expected).norm() <= 1e-8 * (expected - before).norm()

    run.optimizer = new_optimizer(run.model)
    run.stage, run.step = 1, STEP
    model = copy.deepcopy(run.model)
    batch = run.batch(run.data.train.of_classes((2, 3)), run.stages[1])
    training_step(model, new_optimizer(model), batch, None, 1e-3, 0.0, run.precision)
    training_step(run.model, run.optimizer, batch, run.penalty, 1e-3, 0.0, run.precision)
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def _replaced(short: Short, make_run: MakeRun, direction: str) -> tuple[Tensor, Tensor]:
    """The directions of a Fisher matrix and those of the same one under a control, which keeps all else of it."""
    kept = []
    for options in ("slopes", f"{direction},slopes"):
        run = make_run(short(f"rank3:{options}", model="mini", fisher_samples=24))
        learnt = _double(run)
        run.remember(run.stages[0])
        kept.append((learnt[0].fisher, *_terms(run, learnt, slopes=True)))
    (fisher, u, _, _), (control, other, _, b) = kept
    assert torch.equal(control.curvatures, fisher.curvatures)
    assert torch.equal(control.slopes, fisher.slopes)
    assert run.penalty is not None
    torch.testing.assert_close(run.penalty.history.anchor_projections, b)  # type: ignore[union-attr]
    return u, other


def test_random_directions_have_the_curvatures_and_slopes_of_those_they_replace(
    short: Short, make_run: MakeRun
) -> None:
    u, random = _replaced(short, make_run, "random")
    torch.testing.assert_close(random.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (random @ random.T - torch.eye(3)).abs().max() < 0.02  # 160,000 dimensions: 1 / 400 is usual
    assert (random @ u.T).abs().max() < 0.02


def test_random_signs_keep_the_size_of_every_entry_of_a_direction(short: Short, make_run: MakeRun) -> None:
    u, flipped = _replaced(short, make_run, "signs")
    torch.testing.assert_close(flipped.abs(), u.abs())
    assert 0.49 < (flipped * u > 0)[u != 0].double().mean() < 0.51  # 160,000 entries a direction


def test_the_learning_rate_rises_falls_and_never_leaves_its_range() -> None:
    rates = [one_cycle(step, 100, 1e-3) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert 8 <= rates.index(max(rates)) <= 11
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[-1] < 1e-5
    assert one_cycle(0, 1, 1e-3) > 0


def test_a_loss_that_is_not_finite_stops_with_its_step_and_a_cause(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", lr=1e-3))
    stage = run.stages[0]
    run.step = 6
    losses = [torch.tensor([loss, 0.0, 1.0]) for loss in (1.0, float("nan"), float("inf"))]
    with pytest.raises(TrainingError, match=r"not finite at step 5 of stage 1 .*learning rate.*--lr"):
        loop.log_losses(run, stage, losses, 0.1, 0.1, board=None)  # type: ignore[arg-type]
    stiff = make_run(short("rank1:gradient,lam=1e9"))
    stiff.step = 1
    with pytest.raises(TrainingError, match=r"step 1 of stage 2; .*lam=1e\+08 or the decoupled mode"):
        loop.log_losses(stiff, stiff.stages[1], [torch.tensor([float("nan"), 0.0, 1.0])], 0.1, 0.1, board=None)  # type: ignore[arg-type]
