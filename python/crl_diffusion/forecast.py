"""How long a run will take, from the time of a few of its own steps.

Work is counted in passes of one image forwards through the network, a backward pass being two of them. What is not
counted: FIDs, files, and the penalty. The step that is timed has its share of the last two in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from crl_diffusion.method import RunConfig, Stage


def step_work(config: RunConfig, stage: Stage) -> float:
    """Of one step: forwards and backwards on all images, the teacher's targets, and images drawn on the spot."""
    replays = config.recipe.replays if stage.number else ()
    work = 3.0 * config.batch
    for part in replays:
        passes = 3 + (part.target == "teacher") + (config.fresh_steps if part.source == "fresh" else 0)
        work += passes * config.replay_batch
    return work


def end_work(config: RunConfig, plan: Sequence[Stage], stage: Stage) -> float:
    """After a stage's steps: images of the evaluation and of the pool, and the Fisher matrix in two passes."""
    known = sum(len(earlier.classes) for earlier in plan[: stage.number + 1])
    work = float(known * config.eval_samples * config.eval_steps)
    if stage.number + 1 < len(plan):
        if any(part.source == "pool" for part in config.recipe.replays):
            work += known * config.pool * config.pool_steps
        if config.recipe.penalty is not None:
            work += 2 * 3 * config.fisher_samples
    return work


def seconds_left(
    config: RunConfig, plan: Sequence[Stage], steps: Sequence[int], stage: Stage, step: int, step_seconds: float
) -> float:
    """From `step` of `stage` to the run's end, when a step of this stage takes `step_seconds`."""
    work = (steps[stage.number] - step) * step_work(config, stage)
    for later in plan[stage.number + 1 :]:
        work += steps[later.number] * step_work(config, later)
    work += sum(end_work(config, plan, unfinished) for unfinished in plan[stage.number :])
    return step_seconds * work / step_work(config, stage)


def spoken(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
