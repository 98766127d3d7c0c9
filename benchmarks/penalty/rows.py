"""How a row is measured: beside the yardsticks, and compared with the peers of its kind."""

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..common import allocator, command
from ..common.measure import Call, Seconds, clock, interleaved, percentiles, require_memory
from ..common.problem import TASKS, Problem, Unavailable
from .contenders import CONTENDERS, YARDSTICKS, Contender
from .operators import OPERATORS

COPY, LIMIT, ADDITION = "copy", "dot + axpy, flat", "one torch._foreach_add_"
# What a row is compared with, by its number of past tasks.
PAPER = {1: "rank-1, the paper's way", TASKS: "rank-1, the paper's way, 10 tasks"}
LOOP = {1: "diagonal, Python loop", TASKS: "diagonal, Python loop, 10 tasks"}


def parse_size(text: str) -> tuple[int, int]:
    """``25M/100`` -> (25,000,000, 100): parameters and the tensors that hold them."""
    numel, _, tensors = text.partition("/")
    unit = {"K": 1e3, "M": 1e6}.get(numel[-1:], 1)
    return round(float(numel.rstrip("KM")) * unit), int(tensors)


def rounds_for(numel: int) -> int:
    return max(5, min(200, 375_000_000 // numel))


def prepare(contenders: dict[str, Contender], problem: Problem) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls, reasons for those that cannot be measured), made while memory lasts for the call that needs most."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    largest = 0
    for name, contender in contenders.items():
        needed = max(largest, contender.memory + problem.bytes_of_tasks(contender.tasks))
        try:
            require_memory(problem.numel * needed, problem.device)
            calls[name] = contender.make(problem)
        except Unavailable as reason:
            reasons[name] = str(reason)
        else:
            largest = max(largest, contender.memory)
    return calls, reasons


def beside_yardsticks(name: str, contender: Contender, numel: int, tensors: int, rounds: int) -> list[Seconds]:
    """Seconds of one row and of the yardsticks in the same rounds, in this process, on the CPU: with the system's
    allocator, and then, where the C library can do that, with freed memory kept."""
    bytes_per_parameter = Problem.BYTES + contender.memory + Problem.more_bytes(contender.tasks)
    require_memory(numel * bytes_per_parameter, torch.device("cpu"))
    problem = Problem(numel, tensors)
    calls = {yardstick: YARDSTICKS[yardstick].make(problem) for yardstick in YARDSTICKS}
    calls[name] = contender.make(problem)
    measured = [interleaved(calls, rounds, clock())]
    if allocator.keep_freed_memory():
        measured.append(interleaved(calls, rounds, clock()))
    return measured


def row_of(name: str, contender: Contender) -> dict[str, Any]:
    """What is known of a row before it is measured."""
    return {
        "name": name,
        "what": contender.description,
        "counted": contender.counted,
        "bytes_per_parameter": contender.bytes,
        "state_bytes_per_parameter": contender.state,
    }


def measure_row(name: str, label: str, rounds: int | None) -> dict[str, Any]:
    """One row, measured in this process."""
    numel, tensors = parse_size(label)
    try:
        contender = (CONTENDERS | OPERATORS)[name]
        return {"seconds": beside_yardsticks(name, contender, numel, tensors, rounds or rounds_for(numel))}
    except Unavailable as reason:
        return {"skipped": str(reason)}


def measure(label: str, threads: int, rounds: int | None, only: Sequence[str]) -> dict[str, Any]:
    """All rows of one size, each from a process of its own; or the yardsticks and the rows whose names contain a
    word of ``only``."""
    numel, tensors = parse_size(label)
    rows = []
    for name, contender in (CONTENDERS | OPERATORS).items():
        if only and name not in YARDSTICKS and not any(word in name for word in only):
            continue
        options = ["--row", name, "--sizes", label, "--threads", str(threads)]
        options += ["--rounds", str(rounds)] if rounds else []
        result = command.in_own_process("penalty", options, threads)
        row = row_of(name, contender)
        if "skipped" in result:
            row["skipped"] = result["skipped"]
        else:
            # With the system's allocator, and, where the C library can do that, with freed memory kept.
            for seconds, kept in zip(result["seconds"], ("", "_kept"), strict=False):
                row |= {key + kept: value for key, value in percentiles(seconds[name]).items()}
                median = {call: statistics.median(times) for call, times in seconds.items()}
                row["times_limit" + kept] = median[name] / median[LIMIT]
                row["times_addition" + kept] = median[name] / median[ADDITION]
                bandwidth = CONTENDERS[COPY].bytes / median[COPY]
                row["share_of_copy" + kept] = contender.bytes / median[name] / bandwidth
                row["gb_per_s" + kept] = contender.bytes * numel / median[name] / 1e9
        rows.append(row)
        print(f"{label}: {name}: {row.get('skipped', 'measured')}", file=sys.stderr, flush=True)
    compare(rows)
    return {"label": label, "numel": numel, "tensors": tensors, "rounds": rounds or rounds_for(numel), "rows": rows}


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds how many times as long peers take, each measured against the memory limit in its own process."""
    by_name = {row["name"]: row for row in rows}
    for name, row in by_name.items():
        if name not in CONTENDERS or not CONTENDERS[name].penalty:
            continue
        for key, peers in (("paper_over_this", PAPER), ("loop_over_this", LOOP)):
            peer = by_name.get(peers[CONTENDERS[name].tasks], {})
            for kept in ("", "_kept"):
                if f"times_limit{kept}" in row and f"times_limit{kept}" in peer:
                    row[key + kept] = peer[f"times_limit{kept}"] / row[f"times_limit{kept}"]
