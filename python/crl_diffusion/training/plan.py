"""What is settled before a run starts: its resolved configuration, its number of steps, enough images for Fisher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crl_diffusion.config.curriculum import stages
from crl_diffusion.config.settings import DATA_PLANS, Device, RunConfig, least_fisher_samples
from crl_diffusion.config.spelling import spell
from crl_diffusion.data.folder import count_classes
from crl_diffusion.data.tasks import Data
from crl_diffusion.errors import OptionError, in_words
from crl_diffusion.run_folder.class_names import printable


def resolve(config: RunConfig, data_root: Path = Path("data")) -> RunConfig:
    """The configuration with the defaults of its data set, its method in canonical spelling and the device of this
    machine. A configuration is resolved once, where it comes in: all functions but `check` expect the result. For a
    folder of images the classes in `data_root` are counted, unless the tasks are given."""
    defaults = DATA_PLANS[config.data]
    tasks, classes_per_task = config.tasks or defaults.tasks, config.classes_per_task or defaults.classes_per_task
    if config.data == "folder" and not (config.tasks and config.classes_per_task):
        tasks, classes_per_task = fitting(count_classes(data_root), config.tasks, config.classes_per_task)
    return replace(
        config,
        method=spell(config.method),
        image_size=config.image_size or defaults.image_size,
        tasks=tasks,
        classes_per_task=classes_per_task,
        device=resolve_device(config.device),
    )


def require_apart(config: RunConfig, out: Path, data_root: Path) -> None:
    """OptionError if a run would be written into a folder whose folders are classes: its pictures would be a class."""
    if config.data == "folder" and not (data_root / "train").is_dir():
        place, root = out.resolve(), data_root.resolve()
        if place == root or root in place.parents:
            raise OptionError(
                f"--out {str(out)!r} lies in the folder of images {str(data_root)!r}, where its pictures would be "
                "taken for those of a class; give a place outside"
            )


def fitting(classes: int, tasks: int, classes_per_task: int) -> tuple[int, int]:
    """Tasks and classes in each for a folder, of which at least one is 0, which means not given: the defaults of a
    folder if it has enough classes, otherwise all that it has. What does not fit is refused when the data are read."""
    plan = DATA_PLANS["folder"]
    if tasks:
        return tasks, plan.classes_per_task if tasks * plan.classes_per_task <= classes else 1
    if classes_per_task:
        return max(1, min(plan.tasks, classes // classes_per_task)), classes_per_task
    if classes >= plan.tasks * plan.classes_per_task:
        return plan.tasks, plan.classes_per_task
    pairs, odd = divmod(classes, plan.classes_per_task)
    return (pairs, plan.classes_per_task) if pairs > 1 and not odd else (classes, 1)


def about_data(asked: RunConfig, config: RunConfig, data: Data) -> list[str]:
    """Lines about what was chosen for a folder of images: what its reader left out, and tasks that were not given."""
    lines = list(data.notes)
    if config.data == "folder" and not (asked.tasks and asked.classes_per_task):
        left = data.classes - config.tasks * config.classes_per_task
        unused = f"; {left} of them not used, see --tasks and --classes-per-task" if left else ""
        lines.append(
            f"classes: {data.classes} ({in_words(data.class_names)}), in {config.tasks} tasks of "
            f"{config.classes_per_task}{unused}"
        )
    return lines


def data_record(data: Data, data_root: Path) -> dict[str, Any]:
    """What config.json keeps of the data beside their name: the folder, as an absolute path, the names of its classes
    if they have any, and what was left out."""
    names = {"class_names": [printable(name) for name in data.class_names]} if data.class_names else {}
    return {"data_root": str(data_root.absolute()), **names, "data_notes": list(data.notes)}


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
    return [config.task_steps(n) for n in images]


def require_fisher_images(config: RunConfig, data: Data) -> None:
    """OptionError if --fisher-samples is 0 (all images) and a task has too few images for its Fisher matrix. The last
    task needs no Fisher matrix."""
    least = least_fisher_samples(config)
    penalty = config.recipe.penalty
    if penalty is None or not penalty.is_estimated or config.fisher_samples:
        return
    for task in data.tasks[:-1]:
        if (count := len(getattr(task, config.fisher_images))) < least:
            raise OptionError(
                f"--fisher-samples is 0, all images, but task {task.index + 1} has {count} {config.fisher_images} "
                f"images and a Fisher matrix for {config.method} needs {least} samples: give a number; then images are "
                "used more than once, each time with another timestep and noise"
            )
