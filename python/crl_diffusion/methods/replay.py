"""Replay: a source provides images of old classes, a target is what the model must predict on their noised versions.

A new source is one entry in `SOURCES`, a new target one entry in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images, to_pixels
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.diffusion.network import predict
from crl_diffusion.diffusion.noising import Schedule
from crl_diffusion.diffusion.sampling import draw_images, draw_share
from crl_diffusion.methods.guidance import Guide
from crl_diffusion.methods.regression import Moment, NoisedBatch, noise_up, sample_weights, share_of_noise

Target = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]  # teacher, noised, t, label, noise -> target


def _noise(teacher: nn.Module, noised: Tensor, t: Tensor, label: Tensor, noise: Tensor) -> Tensor:
    """Ordinary denoising: the noise that was added to the image."""
    return noise


def _teacher(teacher: nn.Module, noised: Tensor, t: Tensor, label: Tensor, noise: Tensor) -> Tensor:
    """Distillation: the prediction of the teacher for the same noised image and timestep."""
    with torch.no_grad():
        return predict(teacher, noised, t, label)


TARGETS: dict[str, Target] = {"noise": _noise, "teacher": _teacher}


class ReplaySource(Protocol):
    """Provides images of old classes. The teacher, the frozen model of the last task, draws all of them: no image of an
    earlier task is kept."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None: ...

    def refill(self, teacher: nn.Module, images: Images, classes: Sequence[int], stage: int) -> None:
        """Called when the stage with the number `stage` ends. `images` are its training images, from which the source
        may learn and of which it keeps none; `classes` are all classes learnt so far."""

    def draw(self, teacher: nn.Module, n: int, generator: torch.Generator) -> Images:
        """This process's share of n images of old classes."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Pool:
    """Images of the old classes, drawn once after every task."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        self.seed, self.shape, self.per_class, self.steps = config.seed, shape, config.pool, config.pool_steps
        self.shared_latents = config.pool_latents == "shared"
        self.schedule = noising.SCHEDULES[config.schedule]
        self.images = Images(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))

    def refill(self, teacher: nn.Module, images: Images, classes: Sequence[int], stage: int) -> None:
        """Draw `per_class` images of each class with DDIM."""
        label = torch.tensor(classes).repeat_interleave(self.per_class)
        if self.shared_latents:
            same = sampling.draw_latents(self.seed, "pool", torch.zeros_like(label[: self.per_class]), self.shape)
            latents = same.repeat(len(classes), 1, 1, 1)
        else:
            latents = sampling.draw_latents(self.seed, "pool", label, self.shape, stage)
        pixels = to_pixels(draw_images(teacher, self.schedule, latents, label, self.steps))
        self.images = Images(pixels, label)

    def draw(self, teacher: nn.Module, n: int, generator: torch.Generator) -> Images:
        """n images, uniformly and with replacement."""
        return self.images.take(torch.randint(len(self.images), (n,), generator=generator)[processes.share(n)])

    def state(self) -> dict[str, Tensor]:
        return {"pixels": self.images.pixels, "labels": self.images.labels}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.images = Images(state["pixels"], state["labels"])


class Guided(Pool):
    """A pool that is drawn with the guidance of a classifier. Before that, the classifier learns the task from its real
    images and from the pool as it was, so it knows all classes so far."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        super().__init__(config, shape)
        self.guide = Guide(config, shape)

    def refill(self, teacher: nn.Module, images: Images, classes: Sequence[int], stage: int) -> None:
        self.guide.learn(images, self.images, stage)
        super().refill(self.guide.of(teacher), images, classes, stage)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), **self.guide.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.guide.load_state(state)


class Fresh:
    """New images in every step, drawn with a few DDIM steps; their classes are uniform over the old ones."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int]) -> None:
        self.shape, self.steps = shape, config.fresh_steps
        self.schedule = noising.SCHEDULES[config.schedule]
        self.classes = torch.empty(0, dtype=torch.int64)

    def refill(self, teacher: nn.Module, images: Images, classes: Sequence[int], stage: int) -> None:
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


SOURCES: dict[str, type[ReplaySource]] = {"pool": Pool, "fresh": Fresh, "guided": Guided}


def replay_batch(
    target: str,
    position: int,
    weight: float,
    source: ReplaySource,
    teacher: nn.Module,
    n: int,
    schedule: Schedule,
    moment: Moment,
    like: Tensor,
) -> NoisedBatch:
    """This process's share of the n images of one replay in one step. Each has the weight weight / n. `position` is the
    replay's position in the method; it names the random streams."""
    chosen = source.draw(teacher, n, moment.stream(f"replay {position}"))
    t, noise = share_of_noise(chosen, n, moment.stream(f"replay noise {position}"))
    noised, t, label, noise = noise_up(chosen, t, noise, schedule, like)
    return NoisedBatch(
        noised, t, label, TARGETS[target](teacher, noised, t, label, noise), sample_weights(weight / n, label, like)
    )
