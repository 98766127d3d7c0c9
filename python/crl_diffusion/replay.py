"""Replay: everything that is trained on, real or replayed, is one kind of regression data, a `NoisedBatch`.

A source says where old images come from; a target says what the model is asked to predict on their noised versions.
A new source or target is one entry in a table here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from crl_diffusion import diffusion, processes
from crl_diffusion.data import Images, to_float, to_pixels
from crl_diffusion.diffusion import Schedule
from crl_diffusion.method import Method, RunConfig
from crl_diffusion.model import predict


class NoisedBatch(NamedTuple):
    """Regression data: the training loss is sum_b weight_b * mean over C*H*W of (prediction_b - target_b)^2."""

    noised: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    label: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,)


def concatenate(batches: Sequence[NoisedBatch]) -> NoisedBatch:
    return NoisedBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


Target = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]  # teacher, noised, t, label, noise -> target


def _noise(teacher: nn.Module, noised: Tensor, t: Tensor, label: Tensor, noise: Tensor) -> Tensor:
    """Ordinary denoising of an old image."""
    return noise


def _teacher(teacher: nn.Module, noised: Tensor, t: Tensor, label: Tensor, noise: Tensor) -> Tensor:
    """Distillation: what the frozen model of the last task predicts at the same noised image and timestep."""
    with torch.no_grad():
        return predict(teacher, noised, t, label)


TARGETS: dict[str, Target] = {"noise": _noise, "teacher": _teacher}


class Source(Protocol):
    """Where images of old classes come from. All come from the last task's model, the teacher: it is the only memory,
    no earlier image is kept."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None: ...

    def refill(self, teacher: nn.Module, classes: Sequence[int], stage: int) -> None:
        """A task has been learnt: `classes` are all old ones, and the stage has the number `stage`."""

    def draw(self, teacher: nn.Module, n: int, generator: torch.Generator) -> Images:
        """This process's share of n images of old classes."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of this source."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Pool:
    """Images of the old classes, drawn once after every task."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        self.seed, self.shape, self.per_class, self.steps = config.seed, shape, config.pool, config.pool_steps
        self.schedule = diffusion.SCHEDULES[config.schedule]
        self.images = Images(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))

    def refill(self, teacher: nn.Module, classes: Sequence[int], stage: int) -> None:
        """Draw `per_class` images of each class with DDIM."""
        label = torch.tensor(classes).repeat_interleave(self.per_class)
        latents = diffusion.draw_latents(self.seed, "pool", label, self.shape, stage)
        pixels = to_pixels(draw_images(teacher, self.schedule, latents, label, self.steps))
        self.images = Images(pixels, label)

    def draw(self, teacher: nn.Module, n: int, generator: torch.Generator) -> Images:
        """n images, uniformly and with replacement."""
        return self.images.take(torch.randint(len(self.images), (n,), generator=generator)[processes.share(n)])

    def state(self) -> dict[str, Tensor]:
        return {"pixels": self.images.pixels, "labels": self.images.labels}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.images = Images(state["pixels"], state["labels"])


class Fresh:
    """New images in every step, drawn with a few DDIM steps, their classes uniform over the old ones."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        self.shape, self.steps = shape, config.fresh_steps
        self.schedule = diffusion.SCHEDULES[config.schedule]
        self.classes = torch.empty(0, dtype=torch.int64)

    def refill(self, teacher: nn.Module, classes: Sequence[int], stage: int) -> None:
        self.classes = torch.tensor(classes)

    def draw(self, teacher: nn.Module, n: int, generator: torch.Generator) -> Images:
        label = self.classes[torch.randint(len(self.classes), (n,), generator=generator)]
        latents = torch.randn(n, *self.shape, generator=generator)
        label, latents = label[processes.share(n)], latents[processes.share(n)]
        return Images(to_pixels(draw_share(teacher, self.schedule, latents, label, self.steps)), label)

    def state(self) -> dict[str, Tensor]:
        return {"classes": self.classes}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.classes = state["classes"]


SOURCES: dict[str, type[Source]] = {"pool": Pool, "fresh": Fresh}


def draw_images(model: nn.Module, schedule: Schedule, latents: Tensor, label: Tensor, steps: int) -> Tensor:
    """DDIM samples of a model, (N, C, H, W) in [-1, 1], on the CPU; the processes of a run share the work."""
    mine = processes.share(len(label))
    return processes.gather(draw_share(model, schedule, latents[mine], label[mine], steps))


def draw_share(model: nn.Module, schedule: Schedule, latents: Tensor, label: Tensor, steps: int) -> Tensor:
    """The same in this process alone."""
    like = next(model.parameters())

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(model, x, t, y)

    return diffusion.ddim(noise, schedule, latents.to(like), label.to(like.device), steps).cpu()


class Moment(NamedTuple):
    """One step of one stage of one seed: it names the step's random streams."""

    seed: int
    stage: int
    step: int

    def stream(self, purpose: str) -> torch.Generator:
        return diffusion.stream(self.seed, purpose, self.stage, self.step)


def shares(method: Method, stage: int) -> tuple[float, tuple[float, ...]]:
    """Weights of the real loss and of each replay's in a stage, the first being 0; see `Method`."""
    weights = tuple(part.weight for part in method.replays)
    if method.weights == "sum" or not weights:
        return 1.0, weights
    tasks = stage + 1
    return 1 / tasks, tuple(weight * (1 - 1 / tasks) for weight in weights)


def real_batch(images: Images, n: int, weight: float, schedule: Schedule, moment: Moment, like: Tensor) -> NoisedBatch:
    """This process's share of the step's n real images, in epochs, weighing weight / n each; device and dtype are those
    of `like`."""
    whole = epoch_batch(images, n, moment)
    chosen = whole.take(torch.arange(n)[processes.share(n)])
    t, noise = _share_of_noise(chosen, n, moment.stream("noise"))
    noised, t, label, noise = noise_up(chosen, t, noise, schedule, like)
    return NoisedBatch(noised, t, label, noise, _weights(weight / n, label, like))


def replay_batch(
    target: str,
    position: int,
    weight: float,
    source: Source,
    teacher: nn.Module,
    n: int,
    schedule: Schedule,
    moment: Moment,
    like: Tensor,
) -> NoisedBatch:
    """This process's share of the step's n images of one replay, weighing weight / n each; `position` is its place in
    the method."""
    chosen = source.draw(teacher, n, moment.stream(f"replay {position}"))
    t, noise = _share_of_noise(chosen, n, moment.stream(f"replay noise {position}"))
    noised, t, label, noise = noise_up(chosen, t, noise, schedule, like)
    return NoisedBatch(
        noised, t, label, TARGETS[target](teacher, noised, t, label, noise), _weights(weight / n, label, like)
    )


def epoch_batch(images: Images, n: int, moment: Moment, purpose: str = "epoch") -> Images:
    """The step's n images of a walk through shuffled epochs, found without having taken the steps before."""
    total = len(images)
    first = moment.step * n // total
    last = ((moment.step + 1) * n - 1) // total
    order = torch.cat([_shuffled(total, moment.seed, purpose, moment.stage, epoch) for epoch in range(first, last + 1)])
    index = order[moment.step * n - first * total :][:n]
    return images.take(index)


@lru_cache(maxsize=4)
def _shuffled(total: int, seed: int, purpose: str, stage: int, epoch: int) -> Tensor:
    return torch.randperm(total, generator=diffusion.stream(seed, purpose, stage, epoch))


def _share_of_noise(images: Images, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps and noise for images that are this process's share of n: its share of those drawn for all n."""
    t, noise = diffusion.draw_noise(generator, (n, *images.pixels.shape[1:]))
    return t[processes.share(n)], noise[processes.share(n)]


def noise_up(
    images: Images, t: Tensor, noise: Tensor, schedule: Schedule, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised images (B, C, H, W), timesteps (B,), labels (B,), noise (B, C, H, W); device and dtype those of `like`."""
    t, noise = t.to(like.device), noise.to(like)
    clean = to_float(images.pixels, like.dtype).to(like.device)
    return schedule.add_noise(clean, noise, t), t, images.labels.to(like.device), noise


def _weights(each: float, label: Tensor, like: Tensor) -> Tensor:
    return torch.full((len(label),), each, dtype=like.dtype, device=like.device)
