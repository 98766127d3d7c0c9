"""``python -m benchmarks.sample_matrix``: statistics of per-sample gradients, beside one ``torch.sum`` over them.

The calls take turns; times are medians, and ratios are taken within the same rounds. With one thread the clock is
process CPU time; with more it is wall time. Freed memory is kept where the C library can do that (common/allocator.py).
Otherwise every call would fault in the pages of its results and temporaries; ``--system-allocator`` measures that.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor

import crl_kernels as ck
from crl_kernels.backends import registry

from .common import allocator, command
from .common.measure import clock, interleaved, percentiles, processor, require_memory

SUM = "torch.sum"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    grads = torch.empty(rows, columns, dtype=dtype)
    for row in grads:
        row.copy_(torch.randn(columns))
    return grads


def in_pytorch(grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = grads.mean(0)
    return mean, grads.norm(dim=1), grads @ mean


def calls(grads: Tensor, gram: bool) -> dict[str, Callable[[], object]]:
    direction = torch.randn(grads.shape[1])
    result: dict[str, Callable[[], object]] = {
        SUM: grads.sum,
        "sample_gradient_stats": lambda: ck.sample_gradient_stats(grads),
        "... with the diagonal": lambda: ck.sample_gradient_stats(grads, diagonal=True),
        "... on a direction": lambda: ck.sample_gradient_stats(grads, direction),
        "mean, norm, matmul": lambda: in_pytorch(grads),
    }
    if gram:
        result["sample_gram"] = lambda: ck.sample_gram(grads)
        result["torch.mm, in this dtype"] = lambda: grads @ grads.T
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", type=command.count, default=[1, 8, 64, 256], help="N (default: 1 8 64 256)"
    )
    parser.add_argument("--elements", type=command.count, default=256_000_000, help="N P (default: 256,000,000)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=command.count, default=7)
    parser.add_argument("--threads", type=command.count, default=1)
    parser.add_argument("--no-gram", action="store_true", help="leave out the Gram matrix")
    parser.add_argument("--system-allocator", action="store_true", help="give freed memory back to the system")
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(arguments.threads)
    timer = clock()
    kept = not arguments.system_allocator and allocator.keep_freed_memory()
    print(
        f"`{command.command_line('sample_matrix')}`, {date.today()}, {processor()}, "
        f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}, "
        f"{'process CPU' if timer is time.process_time else 'wall'} time, {'freed memory kept, ' if kept else ''}"
        f"torch {torch.__version__}, {registry.implementation('cpu', 'sample_gradient_stats')} kernels; "
        f"median [20th, 80th percentile] of {arguments.rounds} rounds.\n"
    )
    print("| N × P, dtype | | ms | GB/s of the matrix | × torch.sum |\n|---|---|---|---|---|", flush=True)
    for rows in arguments.rows:
        for name in arguments.dtypes:
            columns = arguments.elements // rows
            # 8: the matrix in float32 while it is made, the results, and plain PyTorch's temporaries.
            require_memory(rows * columns * 8, torch.device("cpu"))
            grads = matrix(rows, columns, DTYPES[name])
            seconds = interleaved(calls(grads, not arguments.no_gram), arguments.rounds, timer)
            base = statistics.median(seconds[SUM])
            for call, times in seconds.items():
                p = percentiles(times)
                bandwidth = grads.numel() * grads.element_size() / p["ms"] / 1e6
                print(
                    f"| {rows} × {columns:,} {name} | {call} | {p['ms']:.1f} [{p['ms_p20']:.1f}, {p['ms_p80']:.1f}] "
                    f"| {bandwidth:.1f} | {p['ms'] / 1e3 / base:.2f} |",
                    flush=True,
                )
            del grads


if __name__ == "__main__":
    main()
