"""A run's data: one data set at one image size, its class-incremental tasks, its validation images.

Every data set has a training part and a held-out test part. Validation images are every n-th image of each class of the
training part. They are taken out of it first, so neither the model nor a feature extractor sees them. FIDs compare with
test images or with validation images, see `Settings.held_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crl_diffusion.config.curriculum import task_classes
from crl_diffusion.config.networks import require_size
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.catalog import DATASETS
from crl_diffusion.data.dataset import CatalogEntry, Dataset
from crl_diffusion.data.images import Images, join, rank_in_class
from crl_diffusion.errors import OptionError, in_words


@dataclass(frozen=True)
class Task:
    """Some classes and their images; `held_out` are those that evaluations compare with."""

    index: int
    classes: tuple[int, ...]
    train: Images
    validation: Images
    held_out: Images


@dataclass(frozen=True)
class Data:
    """A data set at one image size, and its first tasks.

    `train` is the training part without its validation images. A feature extractor learns from all of it, even if the
    tasks use fewer images of each class (`per_class`).
    """

    name: str
    classes: int
    train: Images
    test: Images
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...] = ()  # by class number; empty: the numbers are the names
    notes: tuple[str, ...] = ()  # what was chosen or left out when the files were read, a line each

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of one image."""
        return self.train.shape

    def training(self, tasks: Sequence[Task]) -> Images:
        """Training images of some tasks, in the data set's own order."""
        images = join([task.train for task in tasks])
        return images if images.rows is None else images[images.rows.argsort()]


def load(config: RunConfig, root: Path) -> Data:
    """Read the data set of a resolved configuration; `root` is only used by sets kept on disk.

    Validation images are taken from the training part only for runs that use them. Then `per_class` keeps the first
    images of each class.
    """
    entry = DATASETS[config.data]
    if entry.sizes and config.image_size not in entry.sizes:
        offered = " or ".join(map(str, entry.sizes))
        raise OptionError(
            f"--image-size is {config.image_size}, but {config.data} comes in {offered} pixels; choose one of these"
        )
    require_size(config)
    skip = {"skip_unreadable": True} if config.skip_unreadable else {}
    dataset = entry.read(root, config.image_size, **skip)
    plan = task_classes(config)
    if len(plan) * config.classes_per_task > dataset.classes:
        raise OptionError(
            f"--tasks is {config.tasks} and --classes-per-task is {config.classes_per_task}, but {dataset.name} under "
            f"{str(root)!r} has {dataset.classes} classes; their product must not be larger"
        )
    train, validation = dataset.train, dataset.train[torch.empty(0, dtype=torch.int64)]
    if "validation" in (config.held_out, config.fisher_images):
        chosen = rank_in_class(train.labels) % entry.validation_every == entry.validation_every - 1
        train, validation = train[~chosen], train[chosen]
    used = train[rank_in_class(train.labels) < config.per_class] if config.per_class else train
    held_out = validation if config.held_out == "validation" else dataset.test
    tasks = tuple(
        Task(i, c, *(part.of_classes(c) for part in (used, validation, held_out))) for i, c in enumerate(plan)
    )
    _check(config, entry, dataset, tasks)
    return Data(dataset.name, dataset.classes, train, dataset.test, tasks, dataset.class_names, dataset.notes)


def _check(config: RunConfig, entry: CatalogEntry, dataset: Dataset, tasks: Sequence[Task]) -> None:
    """OptionError if a class lacks images that the run needs. A covariance needs two held-out images."""
    for task in tasks:
        needed = {"training": (task.train, 1), f"held-out ({config.held_out})": (task.held_out, 2)}
        if config.fisher_images == "validation":
            needed["validation"] = (task.validation, 1)
        for part, (images, least) in needed.items():
            counts = images.labels.bincount(minlength=dataset.classes)
            for c in task.classes:
                if counts[c] < least:
                    hint = "" if "validation" not in part else f"; every {entry.validation_every}th image validates"
                    name = f"{c} ({in_words([dataset.class_names[c]])})" if dataset.class_names else f"{c}"
                    raise OptionError(
                        f"--data {config.data}: class {name}, in task {task.index + 1}, has {int(counts[c])} {part} "
                        f"images in {dataset.name}{hint}; it needs {least} or more: add images, or choose other tasks "
                        "with --tasks, --classes-per-task or --class-order"
                    )
