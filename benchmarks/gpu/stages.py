"""The stages by name, and how one is run: in a process of its own, once for each backend."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..common import command
from . import capture, operators, optimizer, sample_gradients, speed
from .checks import NeedsGpu

BACKENDS = ("cuda", "triton")


class Stage(NamedTuple):
    """One stage, and how long it may take. The first time, each Triton kernel takes about a second to compile."""

    run: Callable[[str, bool], dict[str, Any]]  # device, whether sizes are small
    seconds: float


STAGES = {  # what matters most comes first: time may run out
    "correctness": Stage(operators.correctness, 180),
    "sample_operators": Stage(sample_gradients.sample_operators, 180),
    "graphs": Stage(capture.graphs, 60),
    "optimizer_graphs": Stage(capture.optimizer_graphs, 60),
    "compilation": Stage(capture.compilation, 120),
    "sample_gradients": Stage(sample_gradients.sample_gradients, 180),
    "races": Stage(operators.races, 120),
    "large": Stage(operators.large, 120),
    "roofline": Stage(speed.roofline, 180),
    "optimizer": Stage(optimizer.optimizer, 120),
    "training_step": Stage(speed.training_step, 120),
    "trainers": Stage(speed.trainers, 180),
    "sample_gradients_speed": Stage(sample_gradients.sample_gradients_speed, 180),
}


def run_stage(name: str, device: str, small: bool) -> None:
    """Prints what happened as one line of JSON."""
    import crl_kernels  # noqa: F401  (defines the operators; raises where the backend cannot run)

    try:
        result = {"status": "ok", "result": STAGES[name].run(device, small)}
    except NeedsGpu as reason:
        result = {"status": "not run", "reason": f"needs {reason}"}
    print(json.dumps(result))


def in_own_process(name: str, backend: str, small: bool, seconds: float) -> dict[str, Any]:
    """What happened within so many seconds, or the stage's own limit; unlike a row's process, a stage's may crash or
    hang."""
    seconds = min(seconds, STAGES[name].seconds)
    if seconds < 1:
        return {"status": "not run", "reason": "no time was left"}
    options = ["--stage", name, *(["--dry-run"] if small else [])]
    start = time.perf_counter()
    try:
        process = command.run("gpu", options, {"CRL_KERNELS_BACKEND": backend}, seconds)
    except subprocess.TimeoutExpired as stopped:
        errors = (stopped.stderr or b"").decode(errors="replace").strip().splitlines()
        return {"status": "failed", "reason": f"took more than {seconds:.0f} s", "stderr": errors[-40:]}
    last = command.last_line(process.stdout)
    if process.returncode != 0 or not last.startswith("{"):
        errors = process.stderr.strip().splitlines()
        return {
            "status": "failed",
            "reason": errors[-1] if errors else f"exit status {process.returncode}",
            "stderr": errors[-40:],
        }
    result: dict[str, Any] = json.loads(last)
    return result | {"seconds": round(time.perf_counter() - start, 1)}
