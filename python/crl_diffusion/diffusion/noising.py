"""Noise schedules, the noising process, the per-sample loss, and named random streams.

Forward process (T = 1000), with abar_t the product of (1 - beta) up to t:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
linear: beta from 1e-4 to 0.02 (DDPM). cosine (Nichol & Dhariwal, arXiv 2102.09672):
    beta_t = min(1 - f(t + 1) / f(t), 0.999),   f(t) = cos^2(((t / T + s) / (1 + s)) pi / 2),   s = 0.008
Loss of one sample: the MEAN over C*H*W of (prediction - target)^2. Penalties' lam belongs to this convention.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIMESTEPS = 1000
COSINE_OFFSET, COSINE_LARGEST_BETA = 0.008, 0.999


@dataclass(frozen=True)
class Schedule:
    """How much of an image is left at each timestep: abar, (T,), float64."""

    alpha_bar: Tensor

    def add_noise(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (B, C, H, W), from images in [-1, 1] and timesteps t, (B,)."""
        # From float64: in float32, 1 - abar would lose four digits at t = 0.
        tables = (self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        signal, sigma = (table.to(images)[t].view(-1, 1, 1, 1) for table in tables)
        return signal * images + sigma * noise

    def snr(self, t: int) -> float:
        """Signal-to-noise ratio abar_t / (1 - abar_t)."""
        return float(self.alpha_bar[t] / (1 - self.alpha_bar[t]))


def _linear() -> Schedule:
    return Schedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), 0))


def _cosine() -> Schedule:
    t = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    f = ((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=COSINE_LARGEST_BETA)
    return Schedule(torch.cumprod(1 - beta, 0))


SCHEDULES: dict[str, Schedule] = {"linear": _linear(), "cosine": _cosine()}


def stream(seed: int, purpose: str, task: int = 0, step: int = 0) -> torch.Generator:
    """The random stream of that name: a CPU generator whose state depends on nothing but its arguments.

    So no generator state needs saving, a run resumes exactly from any step, and all methods of one seed, on any
    device, see the same numbers.
    """
    name = f"{seed}/{purpose}/{task}/{step}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1)


def draw_noise(generator: torch.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Timesteps (B,), uniform over all of them, and float32 noise of `shape` = (B, C, H, W); both on the CPU."""
    return torch.randint(TIMESTEPS, (shape[0],), generator=generator), torch.randn(shape, generator=generator)


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,): the mean over C*H*W of the squared error."""
    return (prediction - target).square().flatten(1).mean(1)
