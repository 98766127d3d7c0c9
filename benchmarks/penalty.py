"""``python -m benchmarks.penalty``: what a penalty's value and gradient cost, as ratios measured in one run.

Calls are interleaved, one of each per round, and medians are taken, so a drift of the machine's speed meets all of
them. With one thread the clock is process CPU time; with more it is wall time.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

import crl_kernels
from crl_kernels.backends import registry

from .contenders import CONTENDERS, Problem, interleaved

LIMIT, PAPER, LOOP = "dot + axpy, flat", "rank-1, the paper's way", "diagonal, Python loop"


def measure(numel: int, tensors: int, rounds: int, threads: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    calls = {name: contender.make(Problem(numel, tensors)) for name, contender in CONTENDERS.items()}
    seconds = interleaved(calls, rounds, time.process_time if threads == 1 else time.perf_counter)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        low, *_, high = statistics.quantiles(values, n=5)
        rows.append(
            {
                "name": name,
                "what": CONTENDERS[name].what,
                "state_bytes_per_parameter": CONTENDERS[name].state_bytes,
                "ms": 1e3 * medians[name],
                "ms_p20": 1e3 * low,
                "ms_p80": 1e3 * high,
                "times_limit": medians[name] / medians[LIMIT],
                "paper_over_this": medians[PAPER] / medians[name],
                "loop_over_this": medians[LOOP] / medians[name],
            }
        )
    return rows


def markdown(result: dict[str, object], rows: list[dict[str, object]]) -> str:
    lines = [
        f"# Penalty value + gradient, {result['numel']:,} float32 parameters in {result['tensors']} tensors",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, {result['threads']} thread(s), torch "
        f"{result['torch']}, {result['implementation']} kernels; median [20th, 80th percentile] of {result['rounds']} "
        "interleaved rounds.",
        "",
        "| | ms | × dot + axpy | paper's way / this | Python loop / this | state, bytes/parameter |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['ms']:.2f} [{row['ms_p20']:.2f}, {row['ms_p80']:.2f}] | {row['times_limit']:.2f} | "
        f"{row['paper_over_this']:.1f} | {row['loop_over_this']:.1f} | {row['state_bytes_per_parameter']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=25_000_000, help="parameters (default: 25 million)")
    parser.add_argument("--tensors", type=int, default=100, help="tensors that hold them (default: 100)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--out", type=Path, help="folder for penalty_*.json and penalty_*.md (default: print only)")
    arguments = parser.parse_args()
    rows = measure(arguments.numel, arguments.tensors, arguments.rounds, arguments.threads)
    options = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("numel", "tensors", "rounds", "threads"))
    result: dict[str, object] = {
        "command": f"python -m benchmarks.penalty {options}",
        "date": date.today().isoformat(),
        "machine": processor(),
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "implementation": registry.implementation("cpu"),
        **{name: getattr(arguments, name) for name in ("numel", "tensors", "rounds", "threads")},
    }
    table = markdown(result, rows)
    print(table)
    if arguments.out:
        stem = arguments.out / f"penalty_cpu_{arguments.threads}thread"
        stem.with_suffix(".json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
