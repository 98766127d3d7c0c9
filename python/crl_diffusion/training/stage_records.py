"""What a stage has done to the weights and to the losses of all tasks: rows of metrics.jsonl, written at its end.

movement, from the second task on, with delta = the weights that the stage ends with - those that the one before it
ended with (in the mode once: before its proximal step):
    displacement     |delta|
    drift            u_k . delta along the unit directions u_k of the penalty, those of past tasks, in their order
    random_drift     |delta| / sqrt(P), the root mean square of r . delta for a random unit direction r of P parameters
    precision        mean of -log sqrt(v) over Adam's second moments v > 0 at the end of the stage, corrected for their
                     start at 0: where it falls by 0.7, Adam's steps are half as long for the same gradient
held_out_loss, one for each task learnt: the mean denoising loss on its held-out images in each band of timesteps. The
images, timesteps and noise depend on the seed only, so differences between stages and between methods are paired.
memory, of all stages but the last: bytes that later tasks need of those so far, besides the penalty's state
    teacher_bytes    weights of the old model, if replays or an interpolation use it
    replay_bytes     pools of images, and the classifier that guides them
adapters, of methods that have them: state_bytes, the size of the adapters of all tasks so far. They have no movement.
"""

from __future__ import annotations

import torch

from crl_diffusion.config.curriculum import Stage
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import predict
from crl_diffusion.files import Row
from crl_diffusion.methods.adapters import AdaptedNetwork
from crl_diffusion.methods.optimizers import adam_denominator
from crl_diffusion.methods.regression import noise_up
from crl_diffusion.training.run import Run

BANDS = 10  # equal bands of timesteps
SAMPLES = 128  # of each task in each band


@torch.no_grad()
def movement(run: Run, stage: Stage) -> list[Row]:
    """The row of a stage that has just ended; none if the weights that it began with are not known."""
    if run.teacher is None:
        return []
    now, then = dict(run.model.named_parameters()), dict(run.teacher.named_parameters())
    delta = {name: now[name].double() - then[name].double() for name in now}
    displacement = sum(float(part.square().sum()) for part in delta.values()) ** 0.5
    row: Row = {"kind": "movement", "task": stage.number + 1, "displacement": displacement}
    row["random_drift"] = displacement / sum(part.numel() for part in delta.values()) ** 0.5
    directions = [] if run.penalty is None else run.penalty.directions()
    row["drift"] = [sum(float((u[name].double() * delta[name]).sum()) for name in u) for u in directions]
    row["precision"] = precision(run) if run.config.optimizer == "adam" else None
    return [row]


def precision(run: Run) -> float | None:
    """See the top of the file; None if Adam has taken no step, because every fp16 gradient has overflowed."""
    total, count = 0.0, 0
    for p in run.model.parameters():
        if p in run.optimizer.state:
            moved = run.optimizer.state[p]["exp_avg_sq"] > 0  # unused rows of an embedding have no gradient
            total -= float(adam_denominator(run.optimizer, p, eps=0.0)[moved].double().log().sum())
            count += int(moved.sum())
    return total / count if count else None


def adapters(run: Run, stage: Stage) -> list[Row]:
    if not isinstance(run.model, AdaptedNetwork):
        return []
    return [{"kind": "adapters", "task": stage.learnt, "state_bytes": run.model.nbytes}]


def memory(run: Run, stage: Stage) -> list[Row]:
    teacher = run.teacher if run.method.replays or run.method.interpolation else None
    weights = () if teacher is None else teacher.state_dict().values()
    replay = [tensor for source in run.sources.values() for tensor in source.state().values()]
    row: Row = {"kind": "memory", "task": stage.learnt, "teacher_bytes": sum(tensor.nbytes for tensor in weights)}
    return [{**row, "replay_bytes": sum(tensor.nbytes for tensor in replay)}]


@torch.no_grad()
def held_out_losses(run: Run, stage: Stage) -> list[Row]:
    rows, count, width = [], BANDS * SAMPLES, noising.TIMESTEPS // BANDS
    for task in run.data.tasks[: stage.learnt]:
        generator = noising.stream(run.config.seed, "held-out loss", task.index)
        images = task.held_out.take(torch.randint(len(task.held_out), (count,), generator=generator))
        t = torch.arange(BANDS).repeat_interleave(SAMPLES) * width + torch.randint(width, (count,), generator=generator)
        noise = torch.randn(count, *run.data.shape, generator=generator)
        losses = []
        for band in torch.arange(count).split(SAMPLES):
            noised, at, label, wanted = noise_up(images.take(band), t[band], noise[band], run.schedule, run.like)
            with run.precision.autocast():
                prediction = predict(run.model, noised, at, label)
            losses.append(float(noising.per_sample_loss(prediction, wanted).double().mean()))
        row: Row = {"kind": "held_out_loss", "after_task": stage.learnt, "task": task.index + 1, "by_band": losses}
        rows.append(row)
    return rows
