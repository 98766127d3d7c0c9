"""The CUDA compiler's machine code: no spilled registers, and 16-byte accesses. Needs no GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[3] / "csrc"
ARCHITECTURES = (
    pytest.param("80", marks=pytest.mark.slow),
    "90",
    pytest.param("100", marks=pytest.mark.slow),
)
# Kernels that stream over the parameters, and whether they write such a stream.
STREAMING = {
    "projections_kernel": False,
    "combine_kernel": True,
    "penalty_kernel": True,
    "quadratic_kernel": False,
    "quadratic_gradient_kernel": True,
    "shrink_kernel": True,
    "low_rank_adamw_kernel": True,
    "diagonal_adamw_kernel": True,
}


def nvcc() -> str | None:
    """The one that setup.py takes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="needs nvcc, on PATH or in $CUDA_HOME/bin"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs the headers of a CUDA build of torch"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton"),
    pytest.mark.skipif(sys.platform != "linux", reason="compiles with Linux's options"),
]


def compiled(source: Path, architecture: str, folder: Path) -> tuple[str, str]:
    """(the assembler's report on each kernel, the machine code)."""
    target = folder / f"{source.stem}_{architecture}.cubin"
    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    options = ["-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-Xptxas=-v"]
    build = subprocess.run(
        [nvcc(), *options, *defines, *includes, str(source), "-o", str(target)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    code = subprocess.run([cuobjdump(), "-sass", str(target)], capture_output=True, text=True)
    assert code.returncode == 0, code.stderr
    return build.stderr, code.stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_16_byte_accesses(architecture, tmp_path):
    seen = set()
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        report, code = compiled(source, architecture, tmp_path)
        kernels = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report, re.DOTALL
        )
        assert kernels
        assert [kernel for kernel in kernels if kernel[1:] != ("0", "0")] == []
        for function in code.split("Function : ")[1:]:
            mangled = function.split()[0]
            # The exact name, with its length before it: quadratic_kernel is not quadratic_gradient_kernel.
            name = next((name for name in STREAMING if f"{len(name)}{name}" in mangled), None)
            if name is None:
                continue
            seen.add(name)
            assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", function), mangled
            if STREAMING[name]:
                assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", function), mangled
    assert seen == set(STREAMING)
