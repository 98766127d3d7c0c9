"""DDIM sampling, in parts and shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.diffusion.network import predict
from crl_diffusion.diffusion.noising import TIMESTEPS, Schedule, stream

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]  # noised (B, C, H, W), t (B,), label (B,) -> noise (B, C, H, W)


def draw_latent(seed: int, purpose: str, c: int, n: int, shape: tuple[int, int, int], task: int = 0) -> Tensor:
    """Starting noise of the n-th image of class c, (C, H, W), from a stream of its own."""
    return torch.randn(shape, generator=stream(seed, f"{purpose}, class {c}", task, n))


def draw_latents(seed: int, purpose: str, label: Tensor, shape: tuple[int, int, int], task: int = 0) -> Tensor:
    """Starting noise, (N, C, H, W), one stream per image: the n-th image of class c starts from the same noise for any
    number of images and any batches."""
    seen: dict[int, int] = {}
    latents = torch.empty(len(label), *shape)
    for i, c in enumerate(label.tolist()):
        n = seen[c] = seen.get(c, -1) + 1
        latents[i] = draw_latent(seed, purpose, c, n, shape, task)
    return latents


@torch.no_grad()
def ddim(
    predict: Predictor, schedule: Schedule, latents: Tensor, label: Tensor, steps: int, batch: int = 256
) -> Tensor:
    """Deterministic DDIM (eta = 0): latents (N, C, H, W) and labels (N,) -> images (N, C, H, W) in [-1, 1].

    Timesteps are 0, s, 2s, ... with s = T // steps, walked downwards. At each of them
        x_0 = clip((x_t - sqrt(1 - abar_t) e) / sqrt(abar_t), -1, 1),   e = predict(x_t, t, label)
        x_{t-s} = sqrt(abar_{t-s}) x_0 + sqrt(1 - abar_{t-s}) e,        abar = 1 below t = 0.
    """
    stride, alpha_bar = TIMESTEPS // steps, schedule.alpha_bar
    walk = [stride * i for i in reversed(range(steps))]
    images = []
    for x, y in zip(latents.split(batch), label.split(batch), strict=True):
        for t in walk:
            abar = alpha_bar[t].item()
            abar_next = alpha_bar[t - stride].item() if t >= stride else 1.0
            noise = predict(x, torch.full_like(y, t), y)
            clean = ((x - (1 - abar) ** 0.5 * noise) / abar**0.5).clamp(-1, 1)
            x = abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * noise
        images.append(x.clamp(-1, 1))
    return torch.cat(images)


def draw_images(model: nn.Module, schedule: Schedule, latents: Tensor, label: Tensor, steps: int) -> Tensor:
    """DDIM samples of a model, (N, C, H, W) in [-1, 1], on the CPU; the processes of a run share the work."""
    mine = processes.share(len(label))
    return processes.gather(draw_share(model, schedule, latents[mine], label[mine], steps))


def draw_share(model: nn.Module, schedule: Schedule, latents: Tensor, label: Tensor, steps: int) -> Tensor:
    """The same in this process alone."""
    like = next(model.parameters())
    return ddim(partial(predict, model), schedule, latents.to(like), label.to(like.device), steps).cpu()
