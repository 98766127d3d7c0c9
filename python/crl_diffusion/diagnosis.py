"""Is rank 1 enough for a trained model? Reads a run folder and calls `crl_kernels.diagnose`. No mathematics here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from crl_diffusion.config.curriculum import reached, stages
from crl_diffusion.config.settings import Device, RunConfig
from crl_diffusion.config.spelling import with_penalty
from crl_diffusion.data.images import to_float
from crl_diffusion.data.tasks import Data, load
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import build
from crl_diffusion.diffusion.noising import Schedule
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import OptionError
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import digest_of
from crl_diffusion.run_folder.readers import read_config, read_run_config
from crl_diffusion.training.fisher_batches import per_sample_loss
from crl_diffusion.training.plan import resolve_device
from crl_diffusion.training.run import Say
from crl_kernels import Diagnosis, diagnose


def per_sample_loss_at(schedule: Schedule, model: nn.Module, batch: Sequence[Tensor], t: Tensor) -> Tensor:
    """The trainer's loss at given timesteps, with new noise: (images, label), (N,) -> (N,)."""
    images, label = batch
    noise = torch.randn_like(images)
    return per_sample_loss(model, (schedule.add_noise(images, noise, t), t, label, noise))


def in_words_of_the_trainer(diagnosis: Diagnosis, method: str) -> Diagnosis:
    """The same diagnosis, whose last sentence says which --method has the form to use, with the replay of `method`."""
    verdict = diagnosis.verdict
    penalty = {"mean": "rank1", "top": "rank1:top", "bands": f"bands{len(diagnosis.at)}:top"}.get(verdict.use)
    name = with_penalty(method, penalty or verdict.use.replace(" ", ""))
    first, second, _ = verdict.sentences
    return replace(
        diagnosis, verdict=replace(verdict, sentences=(first, second, f"Use --method {name}{verdict.reason}"))
    )


def load_again(run: Path, config: RunConfig, data_root: Path | None) -> Data:
    """The data of a run, from `data_root` or, by default, from where they were. OptionError if they are others."""
    record = read_config(run)
    recorded = Path(record.get("data_root", "data"))  # runs of earlier versions have not recorded it
    if data_root is None and config.data != "digits" and not recorded.is_dir():
        raise OptionError(
            f"the images of the run were in {str(recorded)!r}, and there is no such folder any more; say with "
            "--data-root where they are now"
        )
    data = load(config, data_root or recorded)
    if (name := record.get("data_name", data.name)) != data.name:
        raise OptionError(
            f"{str(data_root or recorded)!r} holds the data set {data.name}, but the run was trained on {name}: files "
            "were added, removed or changed; put them back, or say with --data-root where the run's own are"
        )
    return data


def diagnose_run(
    run: Path,
    out: Path,
    task: int | None,
    samples: int,
    timesteps: Sequence[int],
    seed: int,
    data_root: Path | None,
    device: Device,
    say: Say,
) -> tuple[Diagnosis, list[Path]]:
    """Diagnose the newest checkpoint of a run on training images of `task` (from 1) or of all classes learnt.

    Writes the report to `out`. Returns it and its files.
    """
    config = read_run_config(run)
    if config.recipe.adapter_rank:
        raise OptionError(
            f"{str(run)!r} is a run of {config.method}, which keeps the weights of every task and needs no penalty; "
            "diagnose says which penalty suits a model whose tasks share their weights: give a run of another method"
        )

    def require_fits(saved: checkpoint.Checkpoint) -> None:
        if saved.run != digest_of(config):
            raise ValueError("it belongs to a run of another configuration")

    saved, complaints = checkpoint.latest(run / "checkpoints", require_fits)
    for line in complaints:
        say(line)
    if saved is None:
        raise OptionError(f"{str(run)!r} has no good checkpoint; train until the first checkpoint is written")

    # The model knows the classes of finished stages and of the stage that it is in.
    plan = stages(config)
    learnt = reached(plan, saved.stage, saved.step).learnt
    if task is not None and not 1 <= task <= learnt:
        raise OptionError(f"--task is {task}, but the model has learnt {learnt} task(s); give one of these")
    data = load_again(run, config, data_root)
    chosen = data.tasks[:learnt] if task is None else data.tasks[task - 1 : task]
    images = data.training(chosen)
    if len(images) < samples:
        raise OptionError(f"--samples is {samples}, but there are only {len(images)} images; ask for fewer")

    # The model, and images in random order.
    place = torch.device(resolve_device(device))
    schedule = noising.SCHEDULES[config.schedule]
    precision = Precision(config.precision, place)
    model = precision.of(build(config.model, data.shape, data.classes, config.seed))
    model.load_state_dict(saved.part("model"))
    model.to(place)
    order = torch.randperm(len(images), generator=noising.stream(seed, "diagnosis images"))[:samples]
    dtype = next(model.parameters()).dtype
    drawn = images.take(order)
    batch = (to_float(drawn.pixels, dtype).to(place), drawn.labels.to(place))

    moment = f"{saved.stage} finished stage(s)" + (f" and {saved.step} steps of the next" if saved.step else "")
    say(f"{config.label} on {config.data}, seed {config.seed}, after {moment}; {samples} images")
    diagnosis = diagnose(
        model,
        partial(per_sample_loss_at, schedule),
        [batch],
        list(timesteps) or None,
        num_timesteps=noising.TIMESTEPS,
        samples=samples,
        snr=schedule.snr,
        generator=noising.stream(seed, "diagnosis noise"),
        progress=say,
    )
    diagnosis = in_words_of_the_trainer(diagnosis, config.method)
    subject = f"{config.data}, {config.label}" + ("" if task is None else f", task {task}")
    return diagnosis, diagnosis.save(out, f"Is rank 1 enough? {subject}")
