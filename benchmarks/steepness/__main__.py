"""``python -m benchmarks.steepness RUN [RUN ...]``: does a penalty's quadratic predict what later tasks do to old ones?

Reads finished runs of distillation alone, which differ in their seed and in a constant or one-cycle rate. For every
pair of a task and a later one it measures how much the loss of the first has risen, and what was to be expected from
the first-order term, from curvature along the way that the weights took, and from the quadratics of the penalties that
the trainer would have had. One thread.
"""

import shlex
from pathlib import Path

import torch
from crl_diffusion.errors import OptionError

import crl_kernels

from ..common import command
from ..common.measure import commit
from . import report
from .measurement import comparable, measure, shared_options


def main() -> None:
    parser = command.parser("steepness", __doc__, "steepness.json, .md and .png", Path("benchmarks/results"))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders that hold them")
    parser.add_argument("--samples", type=int, default=4096, help="draws that a loss is a mean of (default: 4096)")
    parser.add_argument("--fisher-samples", type=int, default=4000, help="samples of each estimate (default: 4000)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    arguments = parser.parse_args()
    command.require_kernels()
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}; it must be at least 1")
    torch.set_num_threads(1)
    try:
        runs = comparable(arguments.runs)
        record = {
            **command.record_head("steepness"),
            "commit": commit(),
            "torch": torch.__version__,
            "crl_kernels": crl_kernels.__version__,
            "options": shlex.join(shared_options(runs)),
            "samples": arguments.samples,
            "fisher_samples": arguments.fisher_samples,
            "runs": [],
        }
        for run in runs:  # written after each run, because a run takes minutes
            record["runs"].append(measure(run, arguments.data_root, arguments.samples, arguments.fisher_samples))
            drawn = report.picture(record)
            page = report.markdown(record, drawn)
            command.write(arguments.out, "steepness", record, page)
            drawn.save(arguments.out)
            print(f"{run.path}: {len(record['runs'])} of {len(runs)} runs", flush=True)
    except OptionError as error:
        parser.error(str(error))
    print(page)


if __name__ == "__main__":
    main()
