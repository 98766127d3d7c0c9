"""``python -m benchmarks.sample_gradients``: per-sample gradient statistics of one batch, by this library and by peers.

Each row is measured in a process of its own, where its calls and plain forward + backward passes take turns on one
thread. Freed memory is kept (common/allocator.py): every row is then at its best, above all those that hold the matrix.
Ratios are taken round by round, so a drift of the machine's speed affects both sides. One more call of each measures
the peak of its memory (common/memory.py). Each row's results are compared with a loop over the samples. A peer that is
not installed, or that fails on a model, says so in its row. ``pip install opacus backpack-for-pytorch torchjd``, or the
extra ``peers``, installs them.
"""

import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import crl_kernels
from crl_kernels.backends import registry

from ..common import command
from ..common.measure import commit
from .contenders import CONTENDERS
from .models import MODELS, TINY
from .report import markdown
from .rows import measure, measure_row

PEERS = ("opacus", "backpack-for-pytorch", "torchjd", "diffusers")


def installed() -> dict[str, str]:
    versions = {}
    for package in PEERS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def main() -> None:
    parser = command.parser("sample_gradients", __doc__, "sample_gradients.json and .md")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=[*MODELS, *TINY], help=f"(default: {' '.join(MODELS)})"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose names contain a word")
    parser.add_argument("--samples", type=command.count, default=32, help="samples in the batch (default: 32)")
    parser.add_argument("--rounds", type=command.count, default=10, help="rounds (default: 10)")
    parser.add_argument("--row", choices=CONTENDERS, help="only this row, of one model: what was measured, as JSON")
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(1)
    if arguments.row:
        warnings.simplefilter("ignore")
        print(json.dumps(measure_row(arguments.row, arguments.models[0], arguments.samples, arguments.rounds)))
        return
    result: dict[str, Any] = {
        **command.record_head("sample_gradients"),
        "samples": arguments.samples,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "peers": installed(),
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "implementation": registry.implementation("cpu"),
        "models": [],
    }
    for model in arguments.models:  # written after each model, because a large one takes many minutes
        result["models"].append(measure(model, arguments.samples, arguments.rounds, arguments.only))
        command.write(arguments.out, "sample_gradients", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
