"""The stages by name, and how one is run: in a process of its own, once for each backend."""

import json
import subprocess
import time
from typing import Any

from ..common import command
from . import capture, operators, optimizer, sample_gradients, speed
from .checks import NeedsGpu

BACKENDS = ("cuda", "triton")
SECONDS_PER_STAGE = 180  # includes about a second for each Triton kernel that is compiled, the first time


STAGES = {
    "correctness": operators.correctness,
    "races": operators.races,
    "large": operators.large,
    "graphs": capture.graphs,
    "compilation": capture.compilation,
    "roofline": speed.roofline,
    "training_step": speed.training_step,
    "optimizer": optimizer.optimizer,
    "trainers": speed.trainers,
    "sample_operators": sample_gradients.sample_operators,
    "sample_gradients": sample_gradients.sample_gradients,
    "sample_gradients_speed": sample_gradients.sample_gradients_speed,
}


def run_stage(name: str, device: str, small: bool) -> None:
    """Prints what happened as one line of JSON."""
    import crl_kernels  # noqa: F401  (defines the operators; raises where the backend cannot run)

    try:
        result = {"status": "ok", "result": STAGES[name](device, small)}
    except NeedsGpu as reason:
        result = {"status": "not run", "reason": f"needs {reason}"}
    print(json.dumps(result))


def in_own_process(name: str, backend: str, small: bool) -> dict[str, Any]:
    """What happened; unlike a row's process, a stage's may crash or hang."""
    options = ["--stage", name, *(["--dry-run"] if small else [])]
    start = time.perf_counter()
    try:
        process = command.run("gpu", options, {"CRL_KERNELS_BACKEND": backend}, SECONDS_PER_STAGE)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {SECONDS_PER_STAGE} s"}
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
