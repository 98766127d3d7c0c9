"""How long a run takes: passes through the network, before it begins and from the time of a few of its own steps.

The unit is one image's forward pass; a backward pass counts as two. Counted are training with its replays, the
pool's and the evaluations' sampling, and the estimation of Fisher matrices, where a sample's gradient and its square
norm or projection cost about four forward passes. Not counted: FIDs, checkpoints, Fisher matrices that are estimated
from every image of a task once, and penalties' steps, but for those that a timed step has in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.training.run import Run

FISHER_PASSES = 4
FEW_IMAGES, LONG = 4, 10.0  # how many are timed where a whole batch would take longer than so many seconds


def step_passes(config: RunConfig, stage: Stage) -> int:
    """Of one step: forwards and backwards on all images, the teacher's targets, and images drawn on the spot."""
    total = 3 * config.batch
    for replay in config.recipe.replays if stage.number else ():
        drawing = config.fresh_steps if replay.source == "fresh" else 0
        total += (3 + drawing + (replay.target == "teacher")) * config.replay_batch
    return total


def end_passes(config: RunConfig, plan: Sequence[Stage], stage: Stage) -> int:
    """After a stage's steps: images of the evaluation and of the pool, and the Fisher matrix."""
    known = sum(len(earlier.classes) for earlier in plan[: stage.number + 1])
    total = known * config.eval_samples * config.eval_steps
    if stage.number + 1 < len(plan):
        if any(replay.source == "pool" for replay in config.recipe.replays):
            total += known * config.pool * config.pool_steps
        if config.recipe.penalty is not None:
            total += FISHER_PASSES * config.fisher_samples
    return total


def passes(config: RunConfig, steps: Sequence[int]) -> int:
    """Of a whole run, whose stages have so many steps."""
    plan = stages(config)
    return sum(
        n * step_passes(config, stage) + end_passes(config, plan, stage) for n, stage in zip(steps, plan, strict=True)
    )


def seconds_left(
    config: RunConfig, plan: Sequence[Stage], steps: Sequence[int], stage: Stage, step: int, step_seconds: float
) -> float:
    """From `step` of `stage` to the run's end, when a step of this stage takes `step_seconds`."""
    left = (steps[stage.number] - step) * step_passes(config, stage) + end_passes(config, plan, stage)
    for later in plan[stage.number + 1 :]:
        left += steps[later.number] * step_passes(config, later) + end_passes(config, plan, later)
    return step_seconds * left / step_passes(config, stage)


def seconds_per_pass(config: RunConfig, shape: tuple[int, int, int], classes: int) -> float:
    """Seconds of one image's forward pass, timed on this machine as a third of a forward and backward pass. On a CPU
    with one thread, as `compare` runs its cells."""
    import torch

    from crl_diffusion.diffusion.network import build, predict

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
        return timed(config.batch) / (3 * config.batch)  # in small networks much of a pass is not about its images
    finally:
        torch.set_num_threads(threads)


def in_words(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `5.2 hours`, `31 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and unit != "minutes" else f"{amount:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


TIMED_STEPS = 5  # of each stage, after its first: what the forecast of a run's duration rests on


class StepClock:
    """Times a few steps of a stage and says what that means for the rest of the run."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage, self.ticks, self.begun = run, stage, 0, 0.0

    def tick(self) -> None:
        """A step has been taken."""
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
        whole = "this run" if run.steps_done == 1 + TIMED_STEPS else "the rest of this run"
        run.say(f"about {in_words(left)} for {whole} ({steps} steps, now at {1e3 * seconds:.0f} ms, and images)")
