"""What a run costs before it is begun: passes through the network, and how long they take on this machine.

The unit is one image's forward pass; a backward pass counts as two. Counted are training with its replays, the
pool's and the evaluations' sampling, and the estimation of Fisher matrices, where a sample's gradient and its square
norm or projection cost about four forward passes. Penalties' steps, FIDs and checkpoints are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from crl_diffusion.method import RunConfig, Stage, stages

FISHER_PASSES = 4
TIMED_IMAGES = 4  # of one forward and backward pass on a CPU


def stage_steps(config: RunConfig, stage: Stage, task_images: Sequence[int]) -> int:
    """Optimization steps of a stage; `task_images` are the numbers of training images of the run's tasks."""
    if not config.epochs:
        return stage.share * config.steps
    images = sum(task_images) if stage.share > 1 else task_images[stage.number]
    return math.ceil(config.epochs * images / config.batch)


def passes(config: RunConfig, task_images: Sequence[int]) -> int:
    """Forward passes of one image that a run takes, all in all."""
    method, plan = config.recipe, stages(config)
    sources = {replay.source for replay in method.replays}
    a_step = 3 * config.batch
    replays = 0
    for replay in method.replays:
        drawing = config.fresh_steps if replay.source == "fresh" else 0
        teaching = 1 if replay.target == "teacher" else 0
        replays += (3 + drawing + teaching) * config.replay_batch
    total, classes = 0, 0
    for stage in plan:
        classes += len(stage.classes)
        total += stage_steps(config, stage, task_images) * (a_step + (replays if stage.number else 0))
        total += classes * config.eval_samples * config.eval_steps
        if stage.number + 1 < len(plan):
            if "pool" in sources:
                total += classes * config.pool * config.pool_steps
            if method.penalty is not None:
                total += FISHER_PASSES * (config.fisher_samples or task_images[stage.number])
    return total


def seconds_per_pass(config: RunConfig, shape: tuple[int, int, int], classes: int) -> float:
    """Seconds of one image's forward pass, timed on this machine as a third of a forward and backward pass. On a CPU
    with one thread, as `compare` runs its cells."""
    import torch

    from crl_diffusion.model import build, predict

    device, threads = torch.device(config.device), torch.get_num_threads()
    n = TIMED_IMAGES if device.type == "cpu" else config.batch
    model = build(config.model, shape, classes, config.seed).to(device)
    images = torch.zeros(n, *shape, device=device)
    t, label = torch.zeros(n, dtype=torch.int64, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    try:
        torch.set_num_threads(1)
        for _ in range(2):  # the second counts
            start = time.perf_counter()
            predict(model, images, t, label).square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return took / (3 * n)


def in_words(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `5.2 hours`, `31 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and unit != "minutes" else f"{amount:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
