"""Why training cannot go on: numbers that are not finite, and their likely cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from crl_diffusion.config.curriculum import Stage
from crl_diffusion.config.method import OF_ADAM
from crl_diffusion.errors import TrainingError, out_of_memory
from crl_diffusion.files import Row
from crl_diffusion.training.run import Run

SMALLEST_SCALE = 2.0**-10  # below it the gradient scaler has halved 26 times: fp16 cannot represent this network


@contextmanager
def memory_for(moment: str, remedy: str) -> Iterator[None]:
    """TrainingError if memory runs out within the block. `remedy`: the options to lower."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (problem := out_of_memory(error)) is None:
            raise
        raise TrainingError(f"{problem}, {moment}; {remedy}, in a new folder") from error


def require_finite(run: Run, stage: Stage, table: Tensor) -> None:
    """TrainingError if a number is not finite, or fp16 gradients still overflow. `table`: see `loss_table`; its last
    row is the run's newest step."""
    bad = torch.nonzero(~table.isfinite().all(1)).flatten()
    if len(bad):
        raise TrainingError(explain(run, stage, run.step - len(table) + 1, table[: int(bad[0]) + 1]))
    scaler = run.precision.scaler
    if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
        raise TrainingError(
            f"fp16 gradients still overflow at step {run.step} of stage {stage.number + 1}, scaled by "
            f"{scaler.get_scale():g}; try --precision bf16, whose range is that of fp32, in a new folder"
        )


def require_finite_records(run: Run, stage: Stage, rows: Sequence[Row]) -> None:
    """TrainingError if the last step of a stage has spoilt the weights, which no loss of a step shows. `rows`: those of
    `stage_records`."""
    numbers = [x for row in rows for x in (row["by_band"] if row["kind"] == "held_out_loss" else [row["displacement"]])]
    if not all(map(math.isfinite, numbers)):
        problem = f"the loss on held-out images is not finite at the end of stage {stage.number + 1}"
        raise TrainingError(f"{problem}; {likely_cause(run, stage, True, True)}, in a new folder")


def explain(run: Run, stage: Stage, first: int, table: Tensor) -> str:
    """Which number is not finite, at which step, and the likely cause. `table`, (steps, 3), has the real loss, the
    replayed loss and the norm of the gradient of each step, from step `first` to the first that is not finite."""
    real, replayed = table[-1, :2].isfinite().tolist()
    if real and replayed:
        problem = "the gradient is not finite, though the loss is,"
    elif real:
        problem = "the loss on replayed images is not finite"
    elif replayed and run.teacher is not None and run.method.replays:
        problem = "the loss on real images is not finite"
    else:
        problem = "the loss is not finite"
    norms = [f"{value:.2g}" for value in table[:-1, 2].tolist()[-3:]]
    before = f" (norms of the gradient just before: {', '.join(norms)})" if norms else ""
    cause = likely_cause(run, stage, real, replayed)
    return f"{problem} at step {first + len(table) - 1} of stage {stage.number + 1}{before}; {cause}, in a new folder"


def likely_cause(run: Run, stage: Stage, real: bool, replayed: bool) -> str:
    """The likely cause and a remedy. `real`, `replayed`: whether the losses on real and replayed images are finite."""
    config, penalty = run.config, run.method.penalty
    cause = f"the learning rate is likely too high: try --lr {config.lr / 3:.2g}"
    if config.precision == "fp16" and not (real and replayed):
        cause = "the largest fp16 number is 65504, and the network's activations may exceed it: try --precision bf16"
    elif penalty is not None and stage.number > 0 and penalty.mode in ("gradient", *OF_ADAM):
        softer = min(penalty.lam / 10, run.suggested_lam(stage.number) or math.inf)
        cause = f"a stiff penalty in {penalty.mode} mode is unstable: try lam={softer:.3g} or the decoupled mode"
    elif real and not replayed:
        cause = "the teacher's images or predictions are likely broken: look at the evaluation after the last task"
    elif not config.clip:
        cause = f"the gradient is not clipped: try --clip 1, or --lr {config.lr / 3:.2g}"
    return cause
