"""``python -m benchmarks.gpu``: everything that needs a GPU, in one command of a few minutes.

Needs torch, triton and numpy. Uses the crl_kernels that is installed, or this source tree, whose CUDA library it builds
if it is missing. Each stage runs in a process of its own, once for the CUDA C++ kernels and once for Triton's, so a
crash or a hang is recorded and the next stage still runs. The command ends with a table. It writes this table and all
figures to ``--out`` after each stage, so nothing that is known is lost if it is stopped. What has not begun after
``--seconds`` does not run, and the table says so. ``--dry-run`` runs the same code on a CPU, with small sizes; a stage
that needs a GPU says so.
"""

import os
import platform
import subprocess
import sys
import time
from datetime import date
from typing import Any

import torch

from ..common import command
from .report import markdown
from .stages import BACKENDS, STAGES, in_own_process, run_stage


def machine(small: bool) -> dict[str, Any]:
    facts = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    if small:
        return facts | {"device": "dry run on a CPU"}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
    }


def build_where_missing() -> None:
    """The CUDA library of this source tree, for the GPU that is here."""
    if list((command.ROOT / "crl_kernels").glob("_C_cuda*.so")):
        return
    major, minor = torch.cuda.get_device_capability()
    options = {"CRL_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=command.ROOT, env=os.environ | options, check=True)


def main() -> int:
    parser = command.parser("gpu", __doc__, "gpu.json and gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="the same code on a CPU, with small sizes")
    parser.add_argument("--seconds", type=float, default=400, help="time for all stages (default: 400)")
    parser.add_argument(
        "--stages",
        choices=STAGES,
        nargs="+",
        default=list(STAGES),
        metavar="STAGE",
        help=f"run only these: {', '.join(STAGES)}",
    )
    parser.add_argument("--stage", choices=STAGES, help="run one stage in this process, and print its result")
    arguments = parser.parse_args()
    small = arguments.dry_run
    if arguments.stage:
        run_stage(arguments.stage, "cpu" if small else "cuda", small)
        return 0
    if not small and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --dry-run runs the code on a CPU.")
    end = time.monotonic() + arguments.seconds
    if not small:
        build_where_missing()
    record: dict[str, Any] = {"command": command.command_line("gpu"), "machine": machine(small), "stages": {}}
    for name in arguments.stages:
        for backend in ("auto",) if small else BACKENDS:
            stage = in_own_process(name, backend, small, end - time.monotonic())
            record["stages"][f"{backend}: {name}"] = stage
            command.write(arguments.out, "gpu", record, markdown(record))
            print(f"{backend}: {name}: {stage['status']} {stage.get('reason', '')}", flush=True)
    print(markdown(record))
    return 1 if any(stage["status"] == "failed" for stage in record["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
