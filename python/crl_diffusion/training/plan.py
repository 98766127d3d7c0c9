"""What is settled before a run starts: its resolved configuration, its number of steps, enough images for Fisher."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from crl_diffusion.config.curriculum import stages
from crl_diffusion.config.settings import DATA_PLANS, Device, RunConfig, least_fisher_samples
from crl_diffusion.config.spelling import spell
from crl_diffusion.data.tasks import Data
from crl_diffusion.errors import OptionError


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the defaults of its data set, its method in canonical spelling and the device of this
    machine. A configuration is resolved once, where it comes in: all functions but `check` expect the result."""
    defaults = DATA_PLANS[config.data]
    return replace(
        config,
        method=spell(config.method),
        image_size=config.image_size or defaults.image_size,
        tasks=config.tasks or defaults.tasks,
        classes_per_task=config.classes_per_task or defaults.classes_per_task,
        device=resolve_device(config.device),
    )


def resolve_device(device: Device) -> Device:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    return device


def stage_steps(config: RunConfig, data: Data) -> list[int]:
    """Steps of each stage: --steps for each of its tasks, or --epochs over its images."""
    plan = stages(config)
    if not config.epochs:
        return [stage.share * config.steps for stage in plan]
    images = [sum(len(t.train) for t in data.tasks if set(t.classes) <= set(s.classes)) for s in plan]
    return [config.epochs * math.ceil(n / config.batch) for n in images]


def require_fisher_images(config: RunConfig, data: Data) -> None:
    """OptionError if --fisher-samples is 0 (all images) and a task has too few images for its Fisher matrix. The last
    task needs no Fisher matrix."""
    least = least_fisher_samples(config)
    if config.recipe.penalty is None or config.fisher_samples:
        return
    for task in data.tasks[:-1]:
        if (count := len(getattr(task, config.fisher_images))) < least:
            raise OptionError(
                f"--fisher-samples is 0, all images, but task {task.index + 1} has {count} {config.fisher_images} "
                f"images and a Fisher matrix for {config.method} needs {least} samples: give a number; then images are "
                "used more than once, each time with another timestep and noise"
            )
