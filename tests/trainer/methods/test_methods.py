"""Methods are values: they compose, and all methods of one seed see the same data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from crl_diffusion.config.curriculum import Stage, task_classes
from crl_diffusion.config.method import METHODS, Method, Penalty, Replay
from crl_diffusion.data.images import to_pixels
from crl_diffusion.data.tasks import Data
from crl_diffusion.diffusion import sampling
from crl_diffusion.diffusion.network import predict
from crl_diffusion.diffusion.noising import stream
from crl_diffusion.errors import OptionError
from crl_diffusion.methods import penalties, regression, replay
from crl_diffusion.training import run as run_state
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from crl_diffusion.training.plan import require_fisher_images
from crl_diffusion.training.run import Run
from helpers.trainer_runs import MakeRun, Short, few_samples
from torch import Tensor


def _batches(run: Run, stage: Stage) -> list[regression.NoisedBatch]:
    images = run.data.train.of_classes(stage.classes)
    batches = []
    for run.step in range(4):
        batches.append(run.batch(images, stage))
    return batches


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[float]]:
    """What a run's evaluation starts from."""

    def seen(run: Run) -> list[float]:
        values: list[float] = []

        class Enough(Exception):
            pass

        def ddim(predict: object, schedule: object, noise: Tensor, *rest: object) -> Tensor:
            values.extend(noise.flatten().tolist())
            raise Enough

        with monkeypatch.context() as patch, contextlib.suppress(Enough):
            patch.setattr(sampling, "ddim", ddim)
            run.evaluate(run.stages[0])
        assert values
        return values

    return seen


@pytest.mark.parametrize("name", [name for name, value in METHODS.items() if value.curriculum == "continual"])
def test_methods_of_one_seed_see_the_same_real_data(
    name: str, short: Short, make_run: MakeRun, latents: Callable[[Run], list[float]]
) -> None:
    plain, run = make_run(short("fine-tune", model="mini")), make_run(short(name, model="mini"))
    run.penalty = None  # batches are looked at, and 8 samples have no 50 directions
    assert task_classes(run.config) == task_classes(plain.config)
    assert latents(run) == latents(plain)
    for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)
    stage = plain.stages[1]
    run.remember(run.stages[0]) if run.method.replays else None
    n = plain.config.batch
    for a, b in zip(_batches(plain, stage), _batches(run, stage), strict=True):
        assert len(a.t) == n
        assert len(b.t) == n + run.config.replay_batch * len(run.method.replays)
        for x, y in zip(a[:-1], b[:-1], strict=True):
            assert torch.equal(x, y[:n])
        assert torch.equal(b.weight[:n], a.weight * (0.5 if run.method.weights == "tasks" else 1.0))


@few_samples
@pytest.mark.parametrize(
    "option",
    [
        {"lr_later": 0.1},
        {"optimizer": "sgd", "lr": 0.2},
        {"pool_latents": "shared"},
        {"model": "mlp"},
        {"ema": 0.9},
        {"method": "replay+rank1:preconditioned,lam=0.01"},
    ],
    ids=str,
)
def test_runs_of_one_seed_that_differ_in_an_option_see_the_same_data(
    option: dict[str, Any], short: Short, make_run: MakeRun, latents: Callable[[Run], list[float]]
) -> None:
    """Replayed images come from teachers that differ; which of them, their timesteps and their noise are the same."""
    runs = [make_run(short(**{"method": "replay+rank1", "model": "mini", **changed})) for changed in ({}, option)]
    seen = []
    for run in runs:
        first, second = run.stages
        batches = _batches(run, first)
        run.step = 0
        run.take_step(run.task_images(first, "train"), first)
        run.remember(first)
        run.optimizer = run.new_optimizer()
        run.take_step(run.task_images(second, "train"), second)
        seen.append((batches, _batches(run, second)))
    assert latents(runs[0]) == latents(runs[1])
    n = runs[0].config.batch
    for stage, (plain, other) in enumerate(zip(*seen, strict=True)):
        for a, b in zip(plain, other, strict=True):
            assert len(a.t) == n + stage * runs[0].config.replay_batch
            assert torch.equal(a.noised[:n], b.noised[:n])
            for x, y in zip(a[1:], b[1:], strict=True):  # timesteps, labels, noise, weights
                assert torch.equal(x, y)


def test_replayed_data_is_the_same_where_teachers_are(short: Short, make_run: MakeRun) -> None:
    runs = [make_run(short(name)) for name in ("gd", "gd+rank1", "gd+diagonal")]
    for run in runs:
        teacher = Method(replays=run.method.replays)  # without the penalty, which has its own test
        run.method, run.penalty = teacher, None
        run.remember(run.stages[0])
    first, *others = [_batches(run, run.stages[1]) for run in runs]
    for batches in others:
        for a, b in zip(first, batches, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y)


def test_seeds_steps_and_stages_see_different_data(short: Short, make_run: MakeRun) -> None:
    run, other_seed = make_run(short("fine-tune", seed=0)), make_run(short("fine-tune", seed=1))
    seen = [batch.noised for r in (run, other_seed) for stage in r.stages for batch in _batches(r, stage)]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


def test_an_epoch_takes_every_image_once(digits: Data) -> None:
    images = digits.tasks[0].train
    total, n = len(images.labels), 7
    numbered = replace(images, labels=torch.arange(total))
    taken = torch.cat(
        [regression.epoch_batch(numbered, n, regression.Moment(0, 0, step)).labels for step in range(2 * total)]
    )
    for epoch in range(2 * n):
        assert torch.equal(taken[epoch * total : (epoch + 1) * total].sort().values, torch.arange(total))
    assert not torch.equal(taken[:total], taken[total : 2 * total])


def test_a_batch_larger_than_the_data_repeats_images(digits: Data) -> None:
    few = replace(digits.tasks[0].train.take(torch.arange(3)), labels=torch.arange(3))
    labels = regression.epoch_batch(few, 10, regression.Moment(0, 0, 1)).labels
    assert len(labels) == 10
    assert labels.bincount(minlength=3).min() >= 2


def test_parts_compose_into_a_method_that_is_not_in_the_table(
    short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Method(
        (Replay("pool", "noise", 0.5), Replay("pool", "teacher", 2.0)), Penalty("low_rank", 5.0, "gradient")
    )
    monkeypatch.setitem(METHODS, "mine", recipe)
    run = make_run(short("mine"))
    run.remember(run.stages[0])
    assert len(run.sources) == 1  # two replays of one pool
    batch = run.batch(run.data.train.of_classes((2, 3)), run.stages[1])
    real, n = run.config.batch, run.config.replay_batch
    sums = [batch.weight[part].sum().item() for part in (slice(real), slice(real, real + n), slice(real + n, None))]
    assert sums == pytest.approx([1.0, 0.5, 2.0])
    assert set(batch.label[:real].tolist()) <= {2, 3}
    assert set(batch.label[real:].tolist()) <= {0, 1}
    before = [p.clone() for p in run.model.parameters()]
    assert run.take_step(run.data.train.of_classes((2, 3)), run.stages[1]).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_the_pool_is_drawn_from_the_teacher_for_every_old_class(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd", tasks=3))
    run.remember(run.stages[1])
    images = run.sources["pool"].images
    assert images.labels.bincount().tolist() == [3, 3, 3, 3]

    def draw() -> Tensor:
        label = torch.tensor([2])
        latents = sampling.draw_latents(0, "pool", label, (1, 8, 8), task=1)
        assert run.teacher is not None
        return to_pixels(sampling.draw_images(run.teacher, run.schedule, latents, label, 2))

    assert torch.equal(images.of_classes([2]).pixels[:1], draw())
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    assert torch.equal(images.of_classes([2]).pixels[:1], draw())  # training the model leaves the teacher alone


@pytest.mark.parametrize("kind", ["per-class", "shared"])
def test_the_pool_starts_from_noise_of_each_class_and_task_or_of_none(
    kind: str, short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Tensor, list[int]]] = []

    def draw_images(teacher: object, schedule: object, latents: Tensor, label: Tensor, steps: int) -> Tensor:
        started.append((latents, label.tolist()))
        return sampling.draw_images(teacher, schedule, latents, label, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(replay, "draw_images", draw_images)
    run = make_run(short("gd", model="mlp", tasks=3, seed=5, pool_latents=kind))
    for stage in run.stages[:2]:
        run.remember(stage)

    def noise(c: int, task: int, n: int) -> Tensor:
        name = (f"pool, class {c}", task, n) if kind == "per-class" else ("pool, class 0", 0, n)
        return torch.randn(1, 8, 8, generator=stream(5, *name))

    for task, (latents, label) in enumerate(started):
        classes = range(2 * task + 2)
        assert label == [c for c in classes for _ in range(3)]
        assert torch.equal(latents, torch.stack([noise(c, task, n) for c in classes for n in range(3)]))
    label = torch.tensor([2, 2, 2])
    if kind == "shared":
        latents = sampling.draw_latents(5, "pool", torch.zeros(3, dtype=torch.int64), (1, 8, 8))
    else:
        latents = sampling.draw_latents(5, "pool", label, (1, 8, 8), task=1)
    assert run.teacher is not None
    drawn = to_pixels(sampling.draw_images(run.teacher, run.schedule, latents, label, run.config.pool_steps))
    assert torch.equal(run.sources["pool"].images.of_classes([2]).pixels, drawn)


@pytest.mark.parametrize("method", ["l2", "gd+l2-average:gradient"])
def test_an_l2_penalty_estimates_nothing_and_is_as_strong_and_as_large_after_any_number_of_tasks(
    short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(penalties, "estimate_fisher", None)
    monkeypatch.setattr(run_state, "fisher_batches", None)
    run = make_run(short(method, model="mlp", tasks=4, lr_schedule="constant", lr=2e-3))
    assert run.penalty is not None
    for stage in run.stages[:3]:
        run.remember(stage)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1.0)
        assert run.penalty.nbytes == 8 * sum(p.numel() for p in run.model.parameters()) + 8  # and one number
        assert run.suggested_lam(stage.number + 1) == pytest.approx(math.log(2) / (2e-3 * run.config.steps), rel=1e-6)


def test_an_l2_penalty_needs_no_images_of_a_task(short: Short, make_run: MakeRun) -> None:
    data = make_run(short("l2", fisher_images="validation")).data
    tasks = tuple(replace(task, validation=task.validation.take(torch.arange(3))) for task in data.tasks)
    few = replace(data, tasks=tasks)
    settings: dict[str, Any] = {"fisher_samples": 0, "fisher_images": "validation"}
    require_fisher_images(short("l2", **settings), few)
    with pytest.raises(OptionError, match="has 3 validation images"):
        require_fisher_images(short("diagonal", **settings), few)


def test_the_fisher_matrix_sees_its_task_and_the_samples_asked_for(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("rank1", fisher_samples=70))
    stage = run.stages[1]
    batches = fisher_batches(run.data.train.of_classes(stage.classes), stage, run.config, run.schedule, run.like)
    assert [len(batch[0]) for batch in batches] == [32, 32, 6]
    noised, t, label, noise = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert set(label.tolist()) == set(stage.classes)
    assert len(set(t.tolist())) > 50
    trained = _batches(run, stage)[0].noised.flatten(1)
    assert torch.cdist(noised.flatten(1), trained).min() > 0.1  # not what it was trained on
    expected = (noise - predict(run.model, noised, t, label)).square().mean((1, 2, 3))
    torch.testing.assert_close(per_sample_loss(run.model, (noised, t, label, noise)), expected)
