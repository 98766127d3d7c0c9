"""The batches and losses that a task's Fisher is estimated from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.config.curriculum import Stage
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import predict
from crl_diffusion.methods import regression
from crl_diffusion.methods.regression import Moment

FISHER_BATCH = 32


def per_sample_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The loss whose per-sample gradients define the Fisher matrix: (noised, t, label, noise) -> (N,)."""
    noised, t, label, noise = batch
    return noising.per_sample_loss(predict(model, noised, t, label), noise)


def fisher_batches(
    images: Images, stage: Stage, config: RunConfig, schedule: noising.Schedule, like: Tensor
) -> list[tuple[Tensor, ...]]:
    """This process's share of `fisher_samples` images of the task, in shuffled epochs, each with its own timestep and
    noise."""
    batches: list[tuple[Tensor, ...]] = []
    samples = config.fisher_samples or len(images)
    for number, start in enumerate(range(0, samples, FISHER_BATCH)):
        moment = Moment(config.seed, stage.number, number)
        chosen = regression.epoch_batch(images, FISHER_BATCH, moment, "fisher epoch")
        n = min(FISHER_BATCH, samples - start)
        part = chosen.take(torch.arange(n))
        t, noise = noising.draw_noise(moment.stream("fisher noise"), tuple(part.pixels.shape))
        batches.append(regression.noise_up(part, t, noise, schedule, like))
    return batches if processes.count() == 1 else fisher_share(batches)


def fisher_share(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Every count-th sample of each half of the samples. So the first half of a process's samples belongs to the first
    half of all samples, which determines the directions."""
    parts = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    half, rank, count = len(parts[0]) // 2, processes.rank(), processes.count()
    mine = [torch.cat([part[:half][rank::count], part[half:][rank::count]]) for part in parts]
    return list(zip(*(part.split(FISHER_BATCH) for part in mine), strict=True))
