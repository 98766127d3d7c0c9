"""Noising and sampling against diffusers; named random streams."""

from __future__ import annotations

import math

import pytest
import torch
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.diffusion.network import build, predict
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from torch import Tensor

LINEAR = noising.SCHEDULES["linear"]


def test_a_random_stream_depends_on_its_name_only() -> None:
    def first(*name: object) -> list[float]:
        return torch.rand(4, generator=noising.stream(*name)).tolist()  # type: ignore[arg-type]

    names = [
        (0, "noise", 1, 2),
        (1, "noise", 1, 2),
        (0, "epoch", 1, 2),
        (0, "noise", 2, 2),
        (0, "noise", 1, 3),
        (0, "noise", 12),
    ]
    draws = [first(*name) for name in names]
    assert draws == [first(*name) for name in names]
    assert len({tuple(draw) for draw in draws}) == len(names)


DIFFUSERS = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", noising.SCHEDULES)
def test_noising_is_the_ddpm_forward_process(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, 1000, 1, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.arange(1000)
    scheduler = DDPMScheduler(num_train_timesteps=1000, **DIFFUSERS[name])  # type: ignore[arg-type]
    schedule = noising.SCHEDULES[name]
    expected = scheduler.add_noise(images, noise, t)  # type: ignore[arg-type]
    # diffusers' own tables are float32.
    torch.testing.assert_close(schedule.add_noise(images, noise, t), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule.alpha_bar, scheduler.alphas_cumprod.double(), rtol=2e-3, atol=1e-6)


def test_the_cosine_schedule_is_nichol_and_dhariwals() -> None:
    """In float64, from diffusers' own function of time; and by hand at three timesteps, 999 being beyond the clip."""
    beta = betas_for_alpha_bar(1000, max_beta=0.999, alpha_transform_type="cosine").double()
    abar = noising.SCHEDULES["cosine"].alpha_bar
    torch.testing.assert_close(1 - abar[1:] / abar[:-1], beta[1:], rtol=1e-4, atol=1e-7)

    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert abar[0].item() == pytest.approx(f(1) / f(0), rel=1e-12)
    assert abar[499].item() == pytest.approx(f(500) / f(0), rel=1e-12)
    assert abar[999].item() == pytest.approx(f(999) / f(0) * 0.001, rel=1e-9)
    assert noising.SCHEDULES["cosine"].snr(499) == pytest.approx(f(500) / (f(0) - f(500)), rel=1e-10)


def test_the_loss_of_a_sample_is_the_mean_over_its_pixels() -> None:
    prediction, target = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = [
        sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 4
        for a, b in zip(prediction, target, strict=True)
    ]
    assert noising.per_sample_loss(prediction, target).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", noising.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 10, 33, 50])
def test_ddim_is_diffusers_ddim(steps: int, name: str) -> None:
    model = build("tiny", (1, 8, 8), 10, seed=3).eval()
    label = torch.arange(5)
    latents = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(4))

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.9 * x + 0.3 * predict(model, x, t, y)  # an untrained network alone would leave clipping untested

    scheduler = DDIMScheduler(num_train_timesteps=1000, **DIFFUSERS[name])  # type: ignore[arg-type]
    scheduler.set_timesteps(steps)
    x = latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(noise(x, t.expand(5), label), int(t), x).prev_sample
    drawn = sampling.ddim(noise, noising.SCHEDULES[name], latents, label, steps)
    torch.testing.assert_close(drawn, x.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_samples_do_not_depend_on_how_many_are_drawn_or_in_what_batches() -> None:
    model = build("tiny", (1, 8, 8), 10, seed=5).eval().double()
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    latents = sampling.draw_latents(0, "evaluation", label, (1, 8, 8))
    fewer = sampling.draw_latents(0, "evaluation", torch.tensor([1, 1, 0]), (1, 8, 8))
    assert torch.equal(fewer, latents[[3, 4, 0]])
    assert len({tuple(x.flatten().tolist()) for x in latents}) == 6

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(model, x, t, y)

    at_once = sampling.ddim(noise, LINEAR, latents.double(), label, 4)
    parts = sampling.ddim(noise, LINEAR, latents.double(), label, 4, batch=4)
    alone = torch.cat(
        [sampling.ddim(noise, LINEAR, x[None].double(), y[None], 4) for x, y in zip(latents, label, strict=True)]
    )
    torch.testing.assert_close(parts, at_once, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone, at_once, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "tiny"])
def test_sampling_leaves_the_global_random_state_alone(name: str) -> None:
    torch.manual_seed(6)
    before = torch.get_rng_state()
    model = build(name, (1, 8, 8), 10, seed=7)
    label = torch.tensor([0, 1])
    sampling.draw_images(model, LINEAR, sampling.draw_latents(0, "pool", label, (1, 8, 8)), label, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "about"), [("mlp", 118_000), ("mini", 160_000), ("tiny", 360_000)])
def test_weights_depend_on_the_seed_alone(name: str, about: int) -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in build(name, (1, 8, 8), 10, seed).parameters()])

    torch.manual_seed(8)
    first = weights(0)
    torch.manual_seed(9)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert 0.97 * about < len(first) < 1.03 * about
