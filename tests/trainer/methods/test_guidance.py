"""Classifier-guided replay against plain PyTorch written out here, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images
from crl_diffusion.diffusion.mlp import sinusoids
from crl_diffusion.diffusion.noising import SCHEDULES, stream
from crl_diffusion.methods.guidance import Guide, GuidedModel, NoisyClassifier
from crl_diffusion.methods.replay import Guided
from crl_diffusion.training.run import Run
from helpers.trainer_runs import MakeRun, Short, flat
from torch import Tensor, nn

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
Weights = dict[str, Tensor]


def _source(run: Run) -> Guided:
    source = run.sources["guided"]
    assert isinstance(source, Guided)
    return source


def _log_p(w: Weights, x: Tensor, t: Tensor) -> Tensor:
    when = sinusoids(32).double()[t] @ w["time.weight"].T + w["time.bias"]
    h = torch.conv2d(x, w["first.weight"], w["first.bias"], stride=2, padding=1) + when[:, :, None, None]
    h = torch.conv2d(h * h.sigmoid(), w["second.weight"], w["second.bias"], stride=2, padding=1)
    z = (h * h.sigmoid()).flatten(1) @ w["head.weight"].T + w["head.bias"]
    return z - z.logsumexp(1, keepdim=True)


def _learnt(w: Weights, images: Images, pool: Images, stage: int, steps: int, config: RunConfig) -> Weights:
    """Parameters after `steps` steps of Adam, whose rate falls from 0.003 to nothing."""
    w = {name: value.clone() for name, value in w.items()}
    m, v = ({name: torch.zeros_like(value) for name, value in w.items()} for _ in range(2))
    order = torch.cat(
        [torch.randperm(len(images), generator=stream(config.seed, "guide epoch", stage, epoch)) for epoch in range(3)]
    )
    for step in range(steps):
        index = order[config.batch * step : config.batch * (step + 1)]
        pixels, label = images.pixels[index], images.labels[index]
        if stage:
            generator = stream(config.seed, "guide replay", stage, step)
            index = torch.randint(len(pool), (config.replay_batch,), generator=generator)
            pixels, label = torch.cat([pixels, pool.pixels[index]]), torch.cat([label, pool.labels[index]])
        generator = stream(config.seed, "guide noise", stage, step)
        t = torch.randint(1000, (len(label),), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator).double()
        a = ABAR[t].reshape(-1, 1, 1, 1)
        x = a**0.5 * (pixels.double() / 255 * 2 - 1) + (1 - a) ** 0.5 * noise
        leaves = {name: value.requires_grad_() for name, value in w.items()}
        loss = -_log_p(leaves, x, t)[torch.arange(len(t)), label].mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, g in gradients.items():
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
            direction = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            w[name] = w[name].detach() - 0.003 * (1 - step / steps) * direction
    return w


def _guided_pool(run: Run, w: Weights, classes: int, stage: int) -> Tensor:
    """Two DDIM steps, at t = 500 and t = 0, of the teacher with the classifier's guidance, as pixels."""
    assert run.teacher is not None
    label = torch.arange(classes).repeat_interleave(run.config.pool)
    x = torch.stack(
        [
            torch.randn(1, 8, 8, generator=stream(run.config.seed, f"pool, class {c}", stage, n)).double()
            for c in range(classes)
            for n in range(run.config.pool)
        ]
    )
    for when, following in ((500, float(ABAR[0])), (0, 1.0)):
        t = torch.full_like(label, when)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_log_p(w, leaf, t)[torch.arange(len(t)), label].sum(), leaf)
        with torch.no_grad():
            noise = run.teacher(x, t, class_labels=label)[0]
        noise = noise - run.config.guidance * (1 - ABAR[when]) ** 0.5 * slope
        clean = ((x - (1 - ABAR[when]) ** 0.5 * noise) / ABAR[when] ** 0.5).clamp(-1, 1)
        x = following**0.5 * clean + (1 - following) ** 0.5 * noise
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("length", [{"steps": 5}, {"epochs": 1, "batch": 100}], ids=str)
@pytest.mark.parametrize("method", ["ddgr", "guided-gd"])
def test_the_classifier_and_the_images_that_it_guides_are_those_of_plain_pytorch(
    method: str, length: dict[str, Any], short: Short, make_run: MakeRun
) -> None:
    run = make_run(short(method, model="mlp", tasks=3, precision="fp64", guidance=2.5, seed=3, **length))
    source, config = _source(run), run.config
    weights = {name: p.detach().clone() for name, p in source.guide.classifier.named_parameters()}
    for stage in run.stages[:2]:
        pool, images = source.images, run.task_images(stage, "train")
        steps = math.ceil(len(images) / 100) if config.epochs else 5
        run.remember(stage)
        learnt = _learnt(weights, images, pool, stage.number, steps, config)
        begun, expected = (torch.cat([w[name].flatten() for name in learnt]) for w in (weights, learnt))
        actual = torch.cat([source.guide.classifier.get_parameter(name).detach().flatten() for name in learnt])
        assert (actual - expected).norm() <= 1e-9 * (begun - expected).norm()
        weights = learnt
        classes = 2 * stage.number + 2
        assert source.images.labels.tolist() == [c for c in range(classes) for _ in range(config.pool)]
        assert torch.equal(source.images.pixels, _guided_pool(run, weights, classes, stage.number))
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(0.01)  # another teacher after the next task


def test_guidance_subtracts_the_slope_of_the_label_s_log_probability() -> None:
    """Along a random direction, against a central difference."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (torch.zeros_like(x),)

    generator = torch.Generator().manual_seed(1)
    classifier = NoisyClassifier((3, 10, 10), 5).double()
    x, along = (torch.randn(4, 3, 10, 10, generator=generator).double() for _ in range(2))
    t, label, h = torch.tensor([0, 1, 500, 999]), torch.tensor([4, 0, 2, 2]), 1e-5
    for name in ("linear", "cosine"):
        schedule = SCHEDULES[name]
        (noise,) = GuidedModel(Zero(), classifier, schedule, 1.5)(x, t, label)
        with torch.no_grad():
            above, below = (classifier(x + sign * h * along, t)[torch.arange(4), label] for sign in (1, -1))
        expected = -1.5 * (1 - schedule.alpha_bar[t]).sqrt() * (above - below) / (2 * h)
        torch.testing.assert_close((noise * along).sum((1, 2, 3)), expected, rtol=1e-6, atol=1e-10)


def test_without_guidance_the_images_are_those_of_a_pool_and_with_it_they_start_as_those_do(
    short: Short, make_run: MakeRun
) -> None:
    plain, none, guided = (
        make_run(short(method, guidance=strength))
        for method, strength in (("replay", 1.0), ("ddgr", 0.0), ("ddgr", 1.0))
    )
    batches = []
    for run in (plain, none, guided):
        run.remember(run.stages[0])
        batches.append(run.batch(run.task_images(run.stages[1], "train"), run.stages[1]))
    for a, b in zip(batches[0], batches[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(batches[0].noised, batches[2].noised)
    for a, b in zip(batches[0][1:], batches[2][1:], strict=True):  # timesteps, labels, noise, weights
        assert torch.equal(a, b)


def test_guided_images_are_more_likely_of_their_class(short: Short, make_run: MakeRun) -> None:
    """To the classifier, after one task, with a teacher that has learnt nothing."""
    means = []
    for strength in (0.0, 1.0, 3.0):
        run = make_run(short("ddgr", model="mlp", steps=50, guidance=strength, pool=20))
        run.remember(run.stages[0])
        source = _source(run)
        x = source.images.pixels.float() / 127.5 - 1
        with torch.no_grad():
            log_p = source.guide.classifier(x, torch.zeros(len(x), dtype=torch.int64))
        means.append(log_p.gather(1, source.images.labels[:, None]).mean().item())
    assert means == sorted(set(means))


def test_a_classifier_tells_digits_apart(short: Short, make_run: MakeRun) -> None:
    """After 150 steps, at t = 100, on images that it has not seen."""
    run = make_run(short("ddgr", model="mlp", steps=150, batch=32, classes_per_task=5))
    run.remember(run.stages[0])
    images = run.data.tasks[0].held_out
    t = torch.full((len(images),), 100)
    noise = torch.randn(images.pixels.shape, generator=torch.Generator().manual_seed(0))
    noised = run.schedule.add_noise(images.pixels.float() / 127.5 - 1, noise, t)
    assert (_source(run).guide.classifier(noised, t).argmax(1) == images.labels).float().mean() > 0.8


def test_a_seed_names_the_first_weights_of_the_classifier(short: Short) -> None:
    torch.manual_seed(5)
    first = Guide(short("ddgr"), (1, 8, 8))
    torch.manual_seed(6)
    again, other = Guide(short("ddgr"), (1, 8, 8)), Guide(short("ddgr", seed=1), (1, 8, 8))
    assert torch.equal(flat(first.classifier), flat(again.classifier))
    assert not torch.equal(flat(first.classifier), flat(other.classifier))


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 1), (28, 1), (32, 3), (9, 2)])
def test_images_of_any_size_have_a_classifier(size: int, channels: int, short: Short) -> None:
    guide = Guide(short("ddgr", tasks=3), (channels, size, size))
    log_p = guide.classifier(torch.zeros(2, channels, size, size), torch.tensor([0, 999]))
    assert log_p.shape == (2, 6)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))


def test_classes_in_any_order_have_their_own_probability(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("ddgr", class_order=7, tasks=3))
    for stage in run.stages[:2]:
        run.remember(stage)
    learnt = [c for stage in run.stages[:2] for c in stage.classes]
    assert _source(run).images.labels.tolist() == [c for c in learnt for _ in range(3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_the_classifier_computes_in_the_precision_of_its_parameters(
    precision: str, short: Short, make_run: MakeRun
) -> None:
    run = make_run(short("ddgr", model="mlp", precision=precision))
    run.remember(run.stages[0])
    classifier = _source(run).guide.classifier
    dtype = next(classifier.parameters()).dtype
    assert dtype == (torch.float64 if precision == "fp64" else torch.float32)
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([0, 5, 900])
    with run.precision.autocast():
        inside = classifier(x, t)
    assert torch.equal(inside, classifier(x, t))
    assert run.take_step(run.task_images(run.stages[1], "train"), run.stages[1]).isfinite().all()
