"""Noising and sampling against diffusers; named random streams."""

from __future__ import annotations

import pytest
import torch
from crl_diffusion import diffusion, replay
from crl_diffusion.model import build, predict
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor


def test_a_stream_is_its_name() -> None:
    def first(*name: object) -> list[float]:
        return torch.rand(4, generator=diffusion.stream(*name)).tolist()  # type: ignore[arg-type]

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


def test_noising_is_the_ddpm_forward_process() -> None:
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, 1000, 1, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.arange(1000)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    expected = scheduler.add_noise(images, noise, t)  # type: ignore[arg-type]
    # diffusers' own tables are float32.
    torch.testing.assert_close(diffusion.add_noise(images, noise, t), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_sample_is_the_mean_over_its_pixels() -> None:
    prediction, target = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = [
        sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 4
        for a, b in zip(prediction, target, strict=True)
    ]
    assert diffusion.per_sample_loss(prediction, target).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 33, 50])
def test_ddim_is_diffusers_ddim(steps: int) -> None:
    model = build("tiny", (1, 8, 8), 10, seed=3).eval()
    label = torch.arange(5)
    latents = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(4))

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.9 * x + 0.3 * predict(model, x, t, y)  # an untrained network alone would leave clipping untested

    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(steps)
    x = latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(noise(x, t.expand(5), label), int(t), x).prev_sample
    torch.testing.assert_close(diffusion.ddim(noise, latents, label, steps), x.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_samples_do_not_depend_on_how_many_are_drawn_or_in_what_batches() -> None:
    model = build("tiny", (1, 8, 8), 10, seed=5).eval().double()
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    latents = diffusion.draw_latents(0, "evaluation", label, (1, 8, 8))
    fewer = diffusion.draw_latents(0, "evaluation", torch.tensor([1, 1, 0]), (1, 8, 8))
    assert torch.equal(fewer, latents[[3, 4, 0]])
    assert len({tuple(x.flatten().tolist()) for x in latents}) == 6

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(model, x, t, y)

    whole = diffusion.ddim(noise, latents.double(), label, 4)
    parts = diffusion.ddim(noise, latents.double(), label, 4, batch=4)
    alone = torch.cat(
        [diffusion.ddim(noise, x[None].double(), y[None], 4) for x, y in zip(latents, label, strict=True)]
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-10)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(6)
    before = torch.get_rng_state()
    model = build("tiny", (1, 8, 8), 10, seed=7)
    label = torch.tensor([0, 1])
    replay.draw_images(model, diffusion.draw_latents(0, "pool", label, (1, 8, 8)), label, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in build("tiny", (1, 8, 8), 10, seed).parameters()])

    torch.manual_seed(8)
    first = weights(0)
    torch.manual_seed(9)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert 350_000 < len(first) < 370_000
