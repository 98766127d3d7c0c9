"""How times are taken: interleaved rounds, medians with the 20th and 80th percentile; and on which machine."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .problem import Unavailable

Call = Callable[[], object]
Seconds = dict[str, list[float]]


def clock() -> Callable[[], float]:
    """Process CPU time for one thread; wall time for several, whose CPU times would add up."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> Seconds:
    """Seconds of each call, one of each per round, so that a drift of the machine's speed affects all of them. The
    first round is dropped."""
    seconds: Seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, elapsed in _one_round(calls, clock):
            if round_:
                seconds[name].append(elapsed)
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
    """Available memory, where the system reports it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def require_memory(needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise Unavailable(f"needs {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free")


def processor() -> str:
    """The processor's own name where the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this source tree, where there is one."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except FileNotFoundError:
        return None
    return process.stdout.strip() or None
