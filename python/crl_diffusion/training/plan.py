"""The number of steps of each stage, and whether there are enough images for Fisher matrices."""

from __future__ import annotations

import math

from crl_diffusion.config.curriculum import stages
from crl_diffusion.config.settings import RunConfig, least_fisher_samples
from crl_diffusion.data.tasks import Data
from crl_diffusion.errors import OptionError


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
