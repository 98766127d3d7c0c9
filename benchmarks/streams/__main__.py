"""``python -m benchmarks.streams``: histories of long streams of tasks, one thread.

First what each form of a history costs after K tasks: bytes, one call that gives the penalty's value and gradient, one
step of FusedAdamW with the penalty, one append. Then how far each form is from the exact penalty after K tasks of real
streams, trained here. The files are written after each stream, so a run that ends early has those before.
"""

from pathlib import Path

import torch

import crl_kernels
from crl_kernels.backends import registry

from ..common import allocator, command
from ..common.measure import commit, require_memory
from ..common.problem import Unavailable
from . import cost, report, stream

FULL = {"tasks": 200, "seeds": 3, "steps": 20, "parameters": 1_000_000, "tensors": 20, "rounds": 9}
QUICK = {"tasks": 12, "seeds": 1, "steps": 2, "parameters": 2_000, "tensors": 2, "rounds": 2}
LIMITS, QUICK_LIMITS = (1, 4, 10, 30), (1, 4)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)


def main() -> None:
    parser = command.parser("streams", __doc__, "streams.json, .md and .png", Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="sizes that show that it runs, and measure nothing")
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=command.count, help=f"default: {value:,}")
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    sizes = {name: getattr(arguments, name) or value for name, value in (QUICK if arguments.quick else FULL).items()}
    limits = QUICK_LIMITS if arguments.quick else LIMITS
    record = {
        **command.record_head("streams"),
        "commit": commit(),
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "kernels": registry.implementation("cpu", "low_rank_adamw_"),
        **sizes,
        "limits": limits,
        "costs": [],
        "streams": [],
    }
    counts = [count for count in COUNTS if count <= sizes["tasks"]]
    try:
        require_memory(sizes["parameters"] * (2 * 4 * max(counts) + 400), torch.device("cpu"))
    except Unavailable as reason:
        parser.error(
            f"--parameters {sizes['parameters']:,} with --tasks {sizes['tasks']:,} {reason}; give smaller ones."
        )
    for tasks in counts:
        record["costs"] += cost.after(tasks, sizes["parameters"], sizes["tensors"], sizes["rounds"])
        print(f"cost after {tasks} tasks", flush=True)
    for kind in stream.STREAMS:
        for seed in range(sizes["seeds"]):
            record["streams"].append(stream.follow(kind, seed, sizes["tasks"], sizes["steps"], limits))
            page = report.markdown(record)
            command.write(arguments.out, "streams", record, page)
            report.picture(record, arguments.out)
            print(f"{kind.name}, seed {seed}", flush=True)
    print(page)


if __name__ == "__main__":
    main()
