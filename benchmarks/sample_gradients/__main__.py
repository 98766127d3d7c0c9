"""``python -m benchmarks.sample_gradients``: per-sample gradient statistics of one batch, ours against everybody's.

Each row is measured in a process of its own, where its calls and plain forward + backward passes take turns on one
thread, with freed memory kept (allocator.py), which is every row at its best, those that hold the matrix above all.
Ratios are taken round by round, so a drift of the machine's speed meets both sides alike. Peak memory is one more
call's, of each (memory.py). What a row computes is compared with a loop over the samples. Peers that are not installed,
or that fail on a model, say so in their row: ``pip install opacus backpack-for-pytorch torchjd``, or the extra
``peers``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import crl_kernels
from crl_kernels.backends import registry

from . import allocator, memory
from .measure import commit, interleaved, percentiles, processor
from .problem import Unavailable
from .sample_gradient_contenders import CONTENDERS, PLAIN, Case, errors
from .sample_gradient_models import MODELS, TINY

ROOT = Path(__file__).parent.parent
PEERS = ("opacus", "backpack-for-pytorch", "torchjd", "diffusers")
WRONG = 1e-3  # float32 leaves 1e-6; what is further off computes something else


def measure_row(name: str, model: str, samples: int, rounds: int) -> dict[str, Any]:
    """In this process: seconds and peak bytes of one row and of the yardstick, and the row's errors."""
    measurable = memory.can_measure()
    try:
        case = Case((MODELS | TINY)[model], samples)
        calls = {PLAIN: CONTENDERS[PLAIN].make(case)}
        calls[name] = CONTENDERS[name].make(case)
        told: dict[str, Any] = {"errors": errors(calls[name](), case.truth())}
    except Unavailable as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # a peer's own, of whatever kind: it is this row's result
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    if measurable:
        calls[PLAIN]()
        told["peak"] = {}
        for call in calls:
            case.zero_grad()
            told["peak"][call] = memory.peak_bytes(calls[call])
    allocator.keep_freed_memory()
    return told | {"seconds": interleaved(calls, rounds, time.process_time)}


def in_its_own_process(name: str, model: str, samples: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sample_gradients", "--row", name, "--models", model]
    command += ["--rounds", str(rounds), "--samples", str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return told


def measure(model: str, samples: int, rounds: int, only: Sequence[str]) -> dict[str, Any]:
    """All rows of one model; or the yardstick and the rows whose names contain one of the words ``only``."""
    try:
        numel = Case((MODELS | TINY)[model], samples).numel
    except Unavailable as reason:
        return {"model": model, "skipped": str(reason), "rows": []}
    rows = []
    for name, contender in CONTENDERS.items():
        if only and name != PLAIN and not any(word in name for word in only):
            continue
        told = in_its_own_process(name, model, samples, rounds)
        row: dict[str, Any] = {"name": name, "gives": contender.gives, "what": contender.what}
        if "seconds" in told:
            mine, plain = told["seconds"][name], told["seconds"][PLAIN]
            row |= percentiles(mine) | times(mine, plain) | {"errors": told["errors"]}
            if "peak" in told:
                row["peak_mb"] = told["peak"][name] / 1e6
                row["peak_times_plain"] = told["peak"][name] / told["peak"][PLAIN]
        else:
            row |= told
        rows.append(row)
        print(f"{model}: {name}: {row.get('failed') or row.get('skipped') or 'measured'}", file=sys.stderr, flush=True)
    return {"model": model, "numel": numel, "rows": rows}


def times(mine: list[float], plain: list[float]) -> dict[str, float]:
    """How many times as long as the yardstick's pass in the same round."""
    spread = percentiles([a / b for a, b in zip(mine, plain, strict=True)])
    return {"times_plain" + key.removeprefix("ms"): value / 1e3 for key, value in spread.items()}


HEADER = (
    "| | gives | ms | × plain | peak memory, × plain | largest relative error |",
    "|---|---|---|---|---|---|",
)


def table_row(row: dict[str, Any]) -> str:
    if "ms" in row:
        digits = 1 if row["ms"] < 100 else 0
        cells = [
            f"{row['ms']:.{digits}f} [{row['ms_p20']:.{digits}f}, {row['ms_p80']:.{digits}f}]",
            f"{row['times_plain']:.2f} [{row['times_plain_p20']:.2f}, {row['times_plain_p80']:.2f}]",
            f"{row['peak_times_plain']:.2f}" if "peak_times_plain" in row else "",
            error_cell(row["errors"]),
        ]
    else:
        cells = ["fails: " + row["failed"] if "failed" in row else row["skipped"], "", "", ""]
    return "| " + " | ".join([row["name"], ", ".join(row["gives"]), *cells]) + " |"


def error_cell(found: dict[str, float]) -> str:
    wrong = [f"{name} by {100 * value:.2g} %" for name, value in found.items() if not value < WRONG]
    return "**wrong**: " + ", ".join(wrong) if wrong else f"{max(found.values()):.0e}" if found else ""


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Per-sample gradients of a batch of {result['samples']}",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, 1 thread, process CPU time, torch "
        f"{result['torch']}, {', '.join(f'{name} {number}' for name, number in result['peers'].items())}, "
        f"{result['implementation']} kernels; {result['rounds']} rounds, each row in a process of its own beside the "
        "yardstick, with freed memory kept, median [20th, 80th percentile]. *× plain* is taken round by round.",
        "",
        "*Peak memory* is what the process holds at most during one call beyond what it held before it (activations, "
        "gradients, all results and scratch, inside libraries too; not the model), with an allocator that returns "
        "freed memory at once, over the same of plain forward + backward. *Largest relative error* compares norms, "
        "projections and mean with a loop over the samples, summed in float64; rows that are wrong by more than "
        f"{100 * WRONG:.1g} % compute something else.",
    ]
    for model in result["models"]:
        if "skipped" in model:
            lines += ["", f"## {model['model']}", "", model["skipped"]]
            continue
        lines += ["", f"## {model['model']}, {model['numel']:,} parameters", "", *HEADER]
        lines += map(table_row, model["rows"])
    lines += ["", "## The rows", ""]
    what = {row["name"]: row["what"] for model in result["models"] for row in model["rows"]}
    lines += [f"- {name}: {text}" for name, text in what.items()]
    return "\n".join(lines) + "\n"


def installed() -> dict[str, str]:
    told = {}
    for package in PEERS:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "not installed"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=[*MODELS, *TINY], help=f"(default: {' '.join(MODELS)})"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose names contain a word")
    parser.add_argument("--samples", type=int, default=32, help="samples in the batch (default: 32)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (default: 10)")
    parser.add_argument("--out", type=Path, help="folder for sample_gradients.json and .md (default: print only)")
    parser.add_argument("--row", choices=CONTENDERS, help="only this row, of one model: what was measured, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.row:
        warnings.simplefilter("ignore")
        print(json.dumps(measure_row(arguments.row, arguments.models[0], arguments.samples, arguments.rounds)))
        return
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.sample_gradients", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": processor(),
        "samples": arguments.samples,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "peers": installed(),
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "implementation": registry.implementation("cpu"),
        "models": [],
    }
    for model in arguments.models:
        result["models"].append(measure(model, arguments.samples, arguments.rounds, arguments.only))
        if arguments.out:  # after each model, because a large one takes many minutes
            write(result, arguments.out)
    print(markdown(result))


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sample_gradients.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "sample_gradients.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
