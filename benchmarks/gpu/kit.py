"""``make gpu-kit``: one folder to carry to a machine with a GPU and without a network. It has the wheel, the tests, the
benchmarks, the packages that such a machine may lack, and ``run``, which does everything.

The packages are for x86-64 Linux. torch, Triton and numpy are the machine's own.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ..common.command import ROOT

MOST_BYTES = 60_000_000
PACKAGES = (
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers", "expecttest"),
    "safetensors",
    *("diffusers", "importlib-metadata", "zipp", "tyro", "docstring-parser", "typeguard"),  # the stage regime
)
PLATFORM = ["--implementation", "cp", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
RUN = """#!/bin/sh
# Installs the wheels of this folder into it, and runs everything: ./run --out RESULTS
cd "$(dirname "$0")" && rm -rf site && "${PYTHON:=python3}" -m pip install --quiet --no-deps --no-index --no-compile \\
  --target site wheels/*.whl && PYTHONPATH="$PWD/site${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m benchmarks.gpu "$@"
"""


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, check=True)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kit", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-kit", help="folder (default: build/gpu-kit)")
    parser.add_argument("--wheel", type=Path, help="a wheel of this source (default: build one)")
    parser.add_argument("--python", default="3.12", help="the other machine's Python (default: 3.12)")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True)
    if arguments.wheel:
        shutil.copy(arguments.wheel, wheels)
    else:
        pip("wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), ".")
    target = ["--python-version", arguments.python, *PLATFORM, "--dest", str(wheels)]
    pip("download", "--quiet", "--no-deps", "--only-binary=:all:", *target, *PACKAGES)
    unwanted = shutil.ignore_patterns("results", "__pycache__", ".*")
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, out / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", out)
    (out / "run").write_text(RUN)
    (out / "run").chmod(0o755)
    size = bytes_of(out)
    print(f"{out}: {size / 1e6:.1f} MB; on the machine with the GPU: ./run --out RESULTS")
    if size > MOST_BYTES:
        sys.exit(f"expected at most {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
