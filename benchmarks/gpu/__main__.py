"""``python -m benchmarks.gpu``: everything that needs a GPU, in one command of a few minutes.

Needs torch, triton, numpy and safetensors, and pytest and hypothesis for the tests. Uses the crl_kernels that is
installed, or this source tree, whose CUDA library it builds if it is missing, or the wheel that ``--wheel`` names.
Each stage runs in a process of its own, for the CUDA C++ kernels and for Triton's, so a crash or a hang is recorded
and the next stage still runs. Stages that measure times run alone, the others several at a time. The command writes
its table and all figures to ``--out`` after each stage, and what each stage prints to a file in ``logs``, so nothing
that is known is lost if it is stopped. What has not begun after ``--seconds`` does not run, and the table says so.
``--dry-run`` runs the same code on a CPU, with small sizes; it collects the tests, which run on CPUs elsewhere; a
stage that needs a GPU says so.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from ..common import command
from .report import markdown
from .stages import EVERY_OPERATOR, STAGES, in_own_process, run_stage

OPTIONAL = {
    "pytest": "all tests",
    "hypothesis": "tests of operators",
    "expecttest": "torch's own inputs for AdamW",
    "avalanche": "rows of Avalanche's plugin",
    "diffusers": "the paper's UNet in trainers, and the stage regime",
    "tyro": "the stage regime",
}


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
    """The CUDA library of this source tree, for the GPU that is here; nothing where crl_kernels is installed."""
    package = command.ROOT / "crl_kernels"
    if not package.exists() or list(package.glob("_C_cuda*.so")):
        return
    major, minor = torch.cuda.get_device_capability()
    options = {"CRL_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=command.ROOT, env=os.environ | options, check=True)


def with_wheel(wheel: Path, arguments: list[str]) -> int:
    """This command in a folder with the tests, the benchmarks, and the wheel in place of the package's source."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["install", "--quiet", "--no-deps", "--no-index", "--target", f"{folder}/site", str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        for name in ("benchmarks", "tests"):
            shutil.copytree(command.ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("results"))
        shutil.copy(command.ROOT / "pyproject.toml", folder)
        path = os.pathsep.join([f"{folder}/site", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        words = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        return subprocess.run(words, cwd=folder, env=os.environ | {"PYTHONPATH": path}).returncode


def run_stages(names: list[str], small: bool, end: float, out: Path | None) -> dict[str, Any]:
    """The record of all stages, written after each."""
    record: dict[str, Any] = {
        "command": command.command_line("gpu"),
        "machine": machine(small),
        "missing": {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None},
        "stages": {},
    }
    writing = Lock()
    logs = Path(tempfile.mkdtemp()) if out is None else out / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def run(name: str, backend: str) -> None:
        log = logs / f"{backend}-{name}.log"
        stage = in_own_process(name, backend, small, end - time.monotonic(), log)
        with writing:
            record["stages"][f"{backend}: {name}"] = stage
            command.write(out, "gpu", record, markdown(record))
            print(f"{backend}: {name}: {stage['status']} {stage.get('reason', '')}".strip(), flush=True)

    cases = [(name, backend) for name in names for backend in (("auto",) if small else STAGES[name].backends)]
    processes = 1 if small else max(1, min(8, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(processes) as pool:
        for finished in [pool.submit(run, *case) for case in cases if not STAGES[case[0]].alone]:
            finished.result()
    for case in cases:
        if STAGES[case[0]].alone:
            run(*case)
    return record


def main() -> int:
    parser = command.parser("gpu", __doc__, "gpu.json, gpu.md and logs")
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
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel to check, in place of what is installed")
    parser.add_argument(
        "--stage", choices=(*STAGES, EVERY_OPERATOR), help="run one stage in this process, and print its result"
    )
    arguments = parser.parse_args()
    small, out = arguments.dry_run, arguments.out and arguments.out.resolve()
    if arguments.stage:
        run_stage(arguments.stage, "cpu" if small else "cuda", small)
        return 0
    if not small and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --dry-run runs the code on a CPU.")
    end = time.monotonic() + arguments.seconds
    if arguments.wheel:
        options = ["--seconds", str(arguments.seconds), "--stages", *arguments.stages]
        options += ["--dry-run"] * small + (["--out", str(out)] if out else [])
        return with_wheel(arguments.wheel.resolve(), options)
    if not small:
        build_where_missing()
    if out:
        os.environ["CRL_GPU_RESULTS"] = str(out)  # for the stage regime
    record = run_stages(arguments.stages, small, end, out)
    print(markdown(record))
    return 1 if any(stage["status"] == "failed" for stage in record["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
