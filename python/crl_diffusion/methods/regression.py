"""Regression data: a `NoisedBatch`, the one form of all training data, real or replayed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from crl_diffusion import processes
from crl_diffusion.config.method import Method
from crl_diffusion.data.images import Images, to_float
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.noising import Schedule


class NoisedBatch(NamedTuple):
    """Regression data: the training loss is sum_b weight_b * mean over C*H*W of (prediction_b - target_b)^2."""

    noised: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    label: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,)


def concatenate(batches: Sequence[NoisedBatch]) -> NoisedBatch:
    return NoisedBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


class Moment(NamedTuple):
    """One step of one stage of one seed, which names the random streams of the step."""

    seed: int
    stage: int
    step: int

    def stream(self, purpose: str) -> torch.Generator:
        return noising.stream(self.seed, purpose, self.stage, self.step)


def shares(method: Method, stage: int) -> tuple[float, tuple[float, ...]]:
    """Weights of the real loss and of each replay loss in a stage (from 0); see `Method`."""
    weights = tuple(part.weight for part in method.replays)
    if method.weights == "sum" or not weights:
        return 1.0, weights
    tasks = stage + 1
    return 1 / tasks, tuple(weight * (1 - 1 / tasks) for weight in weights)


def real_batch(images: Images, n: int, weight: float, schedule: Schedule, moment: Moment, like: Tensor) -> NoisedBatch:
    """This process's share of the n real images of a step. Each has the weight weight / n. Device and dtype are those
    of `like`."""
    images_of_step = epoch_batch(images, n, moment)
    chosen = images_of_step.take(torch.arange(n)[processes.share(n)])
    t, noise = share_of_noise(chosen, n, moment.stream("noise"))
    noised, t, label, noise = noise_up(chosen, t, noise, schedule, like)
    return NoisedBatch(noised, t, label, noise, sample_weights(weight / n, label, like))


def epoch_batch(images: Images, n: int, moment: Moment, purpose: str = "epoch") -> Images:
    """The n images of a step in a sequence of shuffled epochs, computed without the steps before it."""
    total = len(images)
    first = moment.step * n // total
    last = ((moment.step + 1) * n - 1) // total
    order = torch.cat([_shuffled(total, moment.seed, purpose, moment.stage, epoch) for epoch in range(first, last + 1)])
    index = order[moment.step * n - first * total :][:n]
    return images.take(index)


@lru_cache(maxsize=4)
def _shuffled(total: int, seed: int, purpose: str, stage: int, epoch: int) -> Tensor:
    return torch.randperm(total, generator=noising.stream(seed, purpose, stage, epoch))


def share_of_noise(images: Images, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps and noise for this process's share of n images: its share of those drawn for all n."""
    t, noise = noising.draw_noise(generator, (n, *images.pixels.shape[1:]))
    return t[processes.share(n)], noise[processes.share(n)]


def noise_up(
    images: Images, t: Tensor, noise: Tensor, schedule: Schedule, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised images (B, C, H, W), timesteps (B,), labels (B,), noise (B, C, H, W); device and dtype those of `like`."""
    t, noise = t.to(like.device), noise.to(like)
    clean = to_float(images.pixels, like.dtype).to(like.device)
    return schedule.add_noise(clean, noise, t), t, images.labels.to(like.device), noise


def sample_weights(weight: float, label: Tensor, like: Tensor) -> Tensor:
    return torch.full((len(label),), weight, dtype=like.dtype, device=like.device)
