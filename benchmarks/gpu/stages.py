"""The stages by name, and how one is run: in a process of its own, once for each backend."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..common import command
from . import operators, speed, tests, tools
from .needs import Needs

BACKENDS = ("cuda", "triton")
GPU = "needs a GPU"
TRITONS_OWN = ("cuda",)  # kernels that only Triton has are the same with both backends


class Stage(NamedTuple):
    """``run(device, small)`` gives a result. ``seconds`` is how long it may take; the first time, each Triton kernel
    takes about a second to compile. Stages that measure nothing run several at a time. ``not_dry`` is why a dry run
    leaves the stage out."""

    run: Callable[[str, bool], dict[str, Any]]
    seconds: float
    backends: tuple[str, ...] = BACKENDS
    alone: bool = True
    not_dry: str = ""


def of_tests(
    *files: str,
    seconds: float = 200,
    backends: tuple[str, ...] = BACKENDS,
    not_dry: str = "`make test` runs it on a CPU",
) -> Stage:
    return Stage(partial(tests.run, files), seconds, backends, alone=False, not_dry=not_dry)


STAGES = {  # what matters most comes first: time may run out
    "operators": of_tests(
        "backends/test_operators.py", "backends/test_int8_blocks.py", "backends/test_launches.py", not_dry=""
    ),
    "optimizer": of_tests("optim/test_fused_adamw.py", "optim/test_16_bit_writes.py", "optim/test_capture.py"),
    "sample_operators": of_tests(
        "backends/test_sample_matrix.py", "backends/test_weight_gradients.py", backends=TRITONS_OWN
    ),
    "derivatives": of_tests("operators"),
    "histories": of_tests("penalty"),
    "per_sample": of_tests("per_sample", backends=TRITONS_OWN),
    "fisher": of_tests("fisher", backends=TRITONS_OWN),
    "optimizer_states": of_tests("optim/test_state.py"),
    "torchs_inputs": of_tests("optim/test_against_torch.py", seconds=300),
    "races": Stage(operators.races, 60),
    "large": Stage(operators.large, 60, not_dry=GPU),
    "roofline": Stage(speed.roofline, 120),
    "adamw": Stage(speed.adamw, 60),
    "layouts": Stage(speed.layouts, 60),
    "launches": Stage(speed.launches, 60, ("cuda",), not_dry=GPU),
    "training_step": Stage(speed.training_step, 60),
    "sample_gradients_speed": Stage(speed.sample_gradients, 60, TRITONS_OWN),
    "sanitizers": Stage(tools.sanitizers, 120),
    "compiled_peers": Stage(speed.compiled_peers, 120, ("cuda",), not_dry=GPU),
    "trainers": Stage(speed.trainers, 120),
    "ncu": Stage(tools.ncu, 60, not_dry=GPU),
    "regime": Stage(tools.regime, 900, ("cuda",), not_dry=GPU),
}
# What a stage of ``tools`` starts under a tool: every operator once.
EVERY_OPERATOR = "every_operator"


def run_stage(name: str, device: str, small: bool) -> None:
    """Prints what happened as one line of JSON."""
    import crl_kernels  # noqa: F401  (defines the operators; raises where the backend cannot run)

    stage = Stage(tools.every_operator, 0) if name == EVERY_OPERATOR else STAGES[name]
    try:
        result: dict[str, Any] = {"status": "ok", "result": stage.run(device, small)}
        if failures := result["result"].get("failures"):
            result |= {"status": "failed", "reason": f"{len(failures)} failed: {failures[0]}"}
    except Needs as reason:
        result = {"status": "not run", "reason": f"needs {reason}"}
    print(f"\n{json.dumps(result)}")


def in_own_process(name: str, backend: str, small: bool, seconds: float, log: Path) -> dict[str, Any]:
    """What happened within so many seconds, or the stage's own limit; unlike a row's process, a stage's may crash or
    hang. ``log`` is what it has printed."""
    if small and STAGES[name].not_dry:
        return {"status": "not run", "reason": STAGES[name].not_dry}
    seconds = min(seconds, STAGES[name].seconds)
    if seconds < 1:
        return {"status": "not run", "reason": "no time was left"}
    options = ["--stage", name, *(["--dry-run"] if small else [])]
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *options],
            cwd=command.ROOT,
            env=os.environ | {"CRL_KERNELS_BACKEND": backend, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the programs that it has started
            process.wait()
            return {"status": "failed", "reason": f"took more than {seconds:.0f} s", "log": log.name}
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
    if process.returncode != 0 or not lines[-1].startswith("{"):
        return {"status": "failed", "reason": lines[-1], "log": log.name}
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"seconds": round(time.perf_counter() - start, 1)}
