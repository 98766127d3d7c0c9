"""``python -m benchmarks.penalty``: what a penalty's value and gradient cost, as ratios measured in one run.

Each row is measured in a process of its own, where its calls and the yardsticks' (a copy, the memory limit, one
multi-tensor addition) take turns. Times are medians, and ratios are taken within that process, so a drift of the
machine's speed affects both sides, and no row depends on what another left in the allocator. Everything is measured
twice: with the system's allocator, and with freed memory kept (common/allocator.py). With one thread the clock is
process CPU time; with more it is wall time. A peer that is not installed, or a row that needs more memory than there
is, says so in the table. ``pip install avalanche-lib`` adds Avalanche's own plugin.
"""

import json
from pathlib import Path
from typing import Any

import torch

import crl_kernels
from crl_kernels.backends import registry

from ..common import command
from ..common.measure import commit
from .contenders import CONTENDERS
from .operators import OPERATORS
from .report import conditions, markdown, summary
from .roofline import draw
from .rows import measure, measure_row


def main() -> None:
    parser = command.parser("penalty", __doc__, "penalty_*.json, *.md and the picture")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["0.6M/100", "25M/100", "25M/1", "350M/700"],
        metavar="PARAMETERS/TENSORS",
        help="(default: 0.6M/100 25M/100 25M/1 350M/700)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose names contain a word")
    parser.add_argument(
        "--rounds", type=command.count, help="rounds (default: from 200 for small sizes to 5 for large ones)"
    )
    parser.add_argument("--threads", type=command.count, default=1, help="threads (default: 1)")
    parser.add_argument(
        "--row", choices=CONTENDERS | OPERATORS, help="only this row, of one size: its seconds, as JSON"
    )
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measure_row(arguments.row, arguments.sizes[0], arguments.rounds)))
        return
    result: dict[str, Any] = {
        **command.record_head("penalty"),
        "threads": arguments.threads,
        "clock": "process CPU time" if arguments.threads == 1 else "wall time",
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "implementation": registry.implementation("cpu"),
        "sizes": [],
    }
    for label in arguments.sizes:
        result["sizes"].append(measure(label, arguments.threads, arguments.rounds, arguments.only))
        if arguments.out:  # after each size, because a large one takes many minutes
            write(result, arguments.out)
    print(markdown(result))


def write(result: dict[str, Any], folder: Path) -> None:
    stem = f"penalty_cpu_{result['threads']}thread"
    command.write(folder, stem, result, markdown(result))
    if short := summary(result):
        (folder / f"{stem}_summary.md").write_text(short)
    draw(
        conditions(result | {"command": "Achieved bandwidth"}).replace("`", ""),
        [size for size in result["sizes"] if "ms" in size["rows"][0]],
        folder / f"roofline_cpu_{result['threads']}thread.png",
    )


if __name__ == "__main__":
    main()
