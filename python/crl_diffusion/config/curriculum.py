"""Stages: which classes are learnt together, and in which order. All functions take a resolved configuration."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from crl_diffusion.config.settings import DATA_PLANS, RunConfig


class Stage(NamedTuple):
    """Training on one set of classes with a new optimizer, followed by an evaluation."""

    number: int  # from 0
    classes: tuple[int, ...]
    learnt: int  # tasks that the model should know at the end of the stage
    share: int  # number of steps, in units of the steps of one task


def continual(tasks: Sequence[tuple[int, ...]]) -> list[Stage]:
    """One stage for each task, in order, with the classes of that task only."""
    return [Stage(i, classes, i + 1, 1) for i, classes in enumerate(tasks)]


def joint(tasks: Sequence[tuple[int, ...]]) -> list[Stage]:
    """One stage with all classes and as many steps as all tasks together: the upper bound, not continual."""
    return [Stage(0, tuple(c for classes in tasks for c in classes), len(tasks), len(tasks))]


CURRICULA: dict[str, Callable[[Sequence[tuple[int, ...]]], list[Stage]]] = {"continual": continual, "joint": joint}


def task_classes(config: RunConfig) -> list[tuple[int, ...]]:
    """Classes of each task: (0, 1), (2, 3), ..., or the same pairs of a shuffled order."""
    order = list(range(DATA_PLANS[config.data].classes or config.tasks * config.classes_per_task))
    if config.class_order >= 0:
        random.Random(config.class_order).shuffle(order)
    size = config.classes_per_task
    return [tuple(order[size * i : size * (i + 1)]) for i in range(config.tasks)]


def reached(plan: Sequence[Stage], finished: int, steps: int) -> Stage:
    """The last stage that the model has been trained in, after so many finished stages and steps of the next."""
    return plan[finished] if steps else plan[finished - 1]


def stages(config: RunConfig) -> list[Stage]:
    return CURRICULA[config.recipe.curriculum](task_classes(config))
