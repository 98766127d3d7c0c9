"""How times are taken: interleaved rounds, medians with the 20th and 80th percentile, and what a row says."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import allocator
from .contenders import YARDSTICKS, Contender
from .problem import Problem, Unavailable

Call = Callable[[], object]
Seconds = dict[str, list[float]]


def interleaved(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> Seconds:
    """Seconds of each call, one of each per round, so that the machine's moods meet all alike; the first is dropped."""
    seconds: Seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, took in _one_round(calls, clock):
            if round_:
                seconds[name].append(took)
    return seconds


def _one_round(calls: dict[str, Call], clock: Callable[[], float]) -> Iterator[tuple[str, float]]:
    for name, call in calls.items():
        start = clock()
        call()
        yield name, clock() - start


def percentiles(seconds: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 2
    return {"ms": 1e3 * statistics.median(seconds), "ms_p20": 1e3 * low, "ms_p80": 1e3 * high}


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def require_memory(needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise Unavailable(f"needs {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free")


def prepare(contenders: dict[str, Contender], problem: Problem) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls, reasons of those that cannot be measured). Made one by one, while memory lasts for the hungriest."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    hungriest = 0
    for name, contender in contenders.items():
        needed = max(hungriest, contender.memory + problem.bytes_of_tasks(contender.tasks))
        try:
            require_memory(problem.numel * needed, problem.device)
            calls[name] = contender.make(problem)
        except Unavailable as reason:
            reasons[name] = str(reason)
        else:
            hungriest = max(hungriest, contender.memory)
    return calls, reasons


def beside_yardsticks(name: str, contender: Contender, numel: int, tensors: int, rounds: int) -> list[Seconds]:
    """Seconds of one row and of the yardsticks in the same rounds, in this process, on the CPU: as the system's
    allocator has it, and then, where the C library can do that, with freed memory kept."""
    require_memory(
        numel * (Problem.BYTES + contender.memory + Problem.more_bytes(contender.tasks)), torch.device("cpu")
    )
    problem = Problem(numel, tensors)
    calls = {yardstick: YARDSTICKS[yardstick].make(problem) for yardstick in YARDSTICKS}
    calls[name] = contender.make(problem)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    measured = [interleaved(calls, rounds, clock)]
    if allocator.keep_freed_memory():
        measured.append(interleaved(calls, rounds, clock))
    return measured


def row_of(name: str, contender: Contender) -> dict[str, object]:
    """What is known of a row before it is measured."""
    return {
        "name": name,
        "what": contender.what,
        "counted": contender.counted,
        "bytes_per_parameter": contender.bytes,
        "state_bytes_per_parameter": contender.state,
    }


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this source tree, where there is one."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except FileNotFoundError:
        return None
    return told.stdout.strip() or None
