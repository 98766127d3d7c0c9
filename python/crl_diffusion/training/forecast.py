"""How long a run takes: estimated before it starts, and during the run from the time of a few of its steps.

The unit is the forward pass of one image; a backward pass counts as two. Training with its replays, sampling for the
pool and for evaluations, and the estimation of Fisher matrices are counted. In an estimation, the gradient of a sample
and its square norm or projection cost about four forward passes. FIDs, held-out losses, checkpoints, the classifier of
guided replay, and Fisher matrices that use every image of a task once are not counted. Steps of a penalty count only as
far as the timed steps include them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.diffusion.network import build, predict
from crl_diffusion.training.run import Run

FISHER_PASSES = 4
FEW_IMAGES, LONG = 4, 10.0  # images that are timed if a batch would take longer than LONG seconds


def step_passes(config: RunConfig, stage: Stage) -> int:
    """Passes of one step: forward and backward on all images, the teacher's predictions, and fresh replay images."""
    total = 3 * config.batch
    for replay in config.recipe.replays if stage.number else ():
        drawing = config.fresh_steps if replay.source == "fresh" else 0
        total += (3 + drawing + (replay.target == "teacher")) * config.replay_batch
    return total


def end_passes(config: RunConfig, plan: Sequence[Stage], stage: Stage) -> int:
    """Passes after the steps of a stage: images of the evaluation and of the pool, and the Fisher matrix."""
    known = sum(len(earlier.classes) for earlier in plan[: stage.number + 1])
    total = known * config.eval_samples * config.eval_steps
    if stage.number + 1 < len(plan):
        if any(replay.source in ("pool", "guided") for replay in config.recipe.replays):
            total += known * config.pool * config.pool_steps
        if config.recipe.penalty is not None and config.recipe.penalty.is_estimated:
            total += FISHER_PASSES * config.fisher_samples
    return total


def passes(config: RunConfig, steps: Sequence[int]) -> int:
    """Passes of a run whose stages have `steps` steps each."""
    plan = stages(config)
    return sum(
        n * step_passes(config, stage) + end_passes(config, plan, stage) for n, stage in zip(steps, plan, strict=True)
    )


def seconds_left(
    config: RunConfig, plan: Sequence[Stage], steps: Sequence[int], stage: Stage, step: int, step_seconds: float
) -> float:
    """Seconds from `step` of `stage` to the end of the run, if one step of this stage takes `step_seconds`."""
    left = (steps[stage.number] - step) * step_passes(config, stage) + end_passes(config, plan, stage)
    for later in plan[stage.number + 1 :]:
        left += steps[later.number] * step_passes(config, later) + end_passes(config, plan, later)
    return step_seconds * left / step_passes(config, stage)


def seconds_per_pass(config: RunConfig, shape: tuple[int, int, int], classes: int) -> float:
    """Seconds of the forward pass of one image on this machine: a third of a timed forward and backward pass. On a CPU
    with one thread, as in the processes of `compare`."""
    device, threads = torch.device(config.device), torch.get_num_threads()
    model = build(config.model, shape, classes, config.seed).to(device)

    def timed(n: int) -> float:
        """Seconds of the second pass of n images forwards and backwards."""
        images = torch.zeros(n, *shape, device=device)
        t = label = torch.zeros(n, dtype=torch.int64, device=device)
        for _ in range(2):
            start = time.perf_counter()
            predict(model, images, t, label).square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
        return took

    try:
        torch.set_num_threads(1)
        few = timed(FEW_IMAGES)
        if few * config.batch / FEW_IMAGES > LONG:
            return few / (3 * FEW_IMAGES)
        return timed(config.batch) / (3 * config.batch)  # much of a small network's time is per pass
    finally:
        torch.set_num_threads(threads)


def in_words(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `5.2 hours`, `31 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and unit != "minutes" else f"{amount:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


TIMED_STEPS = 5  # of each stage, after its first step


class StepClock:
    """Times a few steps of a stage and prints the time that the rest of the run will take."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage, self.ticks, self.begun = run, stage, 0, 0.0

    def tick(self) -> None:
        """To be called after each step."""
        self.ticks += 1
        if self.ticks not in (1, 1 + TIMED_STEPS):
            return
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        if self.ticks == 1:  # the first step allocates and loads
            self.begun = time.perf_counter()
            return
        run, seconds = self.run, (time.perf_counter() - self.begun) / TIMED_STEPS
        left = seconds_left(run.config, run.stages, run.stage_steps, self.stage, run.step, seconds)
        steps = sum(run.stage_steps) - run.steps_done
        if not steps:
            return
        scope = "this run" if run.steps_done == 1 + TIMED_STEPS else "the rest of this run"
        run.say(f"about {in_words(left)} for {scope} ({steps} steps, now at {1e3 * seconds:.0f} ms, and images)")
