"""The GPUs that Triton's kernels are compiled for in tests, and the tools that look at what came of it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SLOW_FLOAT64 = ("sm_86", "sm_120")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Bytes of a thread's stack: Triton 3.6 spills two to four registers in four kernels, 3.8 none.
STACK = 0 if VERSION >= (3, 8) else 16


def tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton comes without {name}")
    return str(path)


def registers_and_stack(cubin: Path) -> tuple[int, int]:
    """Registers of each thread of a binary's kernel, and bytes of its stack, where spilled registers would be."""
    command = [tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def needs_linker(target: str) -> None:
    if target in ("gfx942", "hip") and VERSION < (3, 5):
        pytest.skip(f"Triton {triton.__version__} needs ROCm's linker for this target")
