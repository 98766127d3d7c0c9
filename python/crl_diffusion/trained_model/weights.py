"""The model of a run, read from a checkpoint: the weights that an evaluation of that moment would use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crl_diffusion.config.curriculum import reached, stages, task_classes
from crl_diffusion.config.settings import Device, RunConfig
from crl_diffusion.diffusion.network import sizes
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import PUT_BACK, OptionError, RecordError
from crl_diffusion.files import Row
from crl_diffusion.methods.adapters import base_weights, new_network
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import Checkpoint
from crl_diffusion.run_folder.class_names import ClassNames
from crl_diffusion.run_folder.layout import digest_of
from crl_diffusion.run_folder.readers import read_config, read_run_config
from crl_diffusion.training.plan import resolve_device


class TrainedModel(NamedTuple):
    """A model, and what is known of its run."""

    config: RunConfig
    data_name: str
    names: ClassNames
    model: nn.Module  # in evaluation mode, on its device
    precision: Precision
    shape: tuple[int, int, int]  # (C, S, S) of one image
    classes: int  # that the network has labels for
    tasks: list[tuple[int, ...]]  # the labels of the tasks that it has learnt, in their order
    moment: str  # when its weights were saved, in words
    sha256: str  # of its weights

    @property
    def learnt(self) -> list[int]:
        """The labels that it has learnt, task by task."""
        return [c for classes in self.tasks for c in classes]

    @property
    def subject(self) -> str:
        return f"{self.config.label} on {self.data_name}, seed {self.config.seed}, {self.moment}"

    def origin(self) -> Row:
        """What a record of something that was made with it says of it."""
        return {
            "run": self.config.label,
            "run_seed": self.config.seed,
            "data": self.data_name,
            "moment": self.moment,
            "weights_sha256": self.sha256,
        }


def read(run: Path, task: int | None, device: Device, say: Callable[[str], None]) -> TrainedModel:
    """The model of the newest good checkpoint of a run or, if `task` is given (from 1), that of the end of this task.

    Within a task the weights are the average of --ema, if the run has one, as at the end of a task.
    """
    config, record = read_run_config(run), read_config(run)

    def require_fits(saved: Checkpoint) -> None:
        if saved.run != digest_of(config):
            raise ValueError("it belongs to a run of another configuration")
        sizes(config.model, base_weights(saved.part("model")), config.image_size)

    plan = stages(config)
    if task is not None:
        saved = _end_of_task(run, config, task, require_fits)
    else:
        newest, complaints = checkpoint.latest(run / "checkpoints", require_fits)
        for line in complaints:
            say(line)
        if newest is None:
            raise OptionError(f"{str(run)!r} has no good checkpoint; train until the first checkpoint is written")
        saved = newest
        if saved.stage < len(plan):
            say(f"{run} is not finished, or its last checkpoints are lost: this is the model of its newest checkpoint")
    learnt = reached(plan, saved.stage, saved.step).learnt
    weights = {**saved.part("model"), **saved.part("average")}
    shape, classes = sizes(config.model, base_weights(weights), config.image_size)
    place = torch.device(resolve_device(device))
    precision = Precision(config.precision, place)
    model = precision.of(new_network(config, shape, classes, learnt))
    model.load_state_dict(weights)
    return TrainedModel(
        config,
        str(record.get("data_name", config.data)),
        ClassNames.recorded(record),
        model.to(place).eval(),
        precision,
        shape,
        classes,
        task_classes(config)[:learnt],
        f"after step {saved.step} of task {learnt}" if saved.step else f"after task {learnt}",
        _sha256(weights),
    )


def _end_of_task(run: Path, config: RunConfig, task: int, check: Callable[[Checkpoint], None]) -> Checkpoint:
    stage = next((stage for stage in stages(config) if stage.learnt == task), None)
    if stage is None:
        ends = ", ".join(str(stage.learnt) for stage in stages(config))
        raise OptionError(f"--task is {task}, but a run of {config.method} here ends its tasks with {ends}; give one")
    path = checkpoint.end_of_stage(run / "checkpoints", stage.number)
    if not path.exists():
        raise OptionError(
            f"--task is {task}, but there is no {path.name} in {str(path.parent)!r}: the run has not come so far, or "
            "the file was deleted; give an earlier task, or leave the option out"
        )
    try:
        saved = checkpoint.load(path)
        check(saved)
    except (ValueError, KeyError) as error:
        raise RecordError(path, f"is damaged ({error})", f"{PUT_BACK}, or give another --task") from None
    return saved


def _sha256(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
