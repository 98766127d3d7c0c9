"""The CUDA kernels on a machine without a GPU: compiled for the host, threads as fibers, under the same tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

TESTS = Path(__file__).parent
COMPILER = shutil.which("g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("emulation") / "emulated_cuda.so"
    includes = [f"-I{path}" for path in (TESTS / "cuda_emulation", TESTS.parent / "csrc", *include_paths())]
    libraries = [f"-L{path}" for path in library_paths()]
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    source = str(TESTS / "cuda_emulation" / "operators.cpp")
    command = [COMPILER, *options, *includes, source, *libraries, "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.skipif("CRL_TEST_LIBRARY" in os.environ, reason="this is the run that the test below starts")
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_operators_and_derivatives(library):
    files = [str(TESTS / name) for name in ("test_operators.py", "test_autograd.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"CRL_KERNELS_BACKEND": "reference", "CRL_TEST_LIBRARY": str(library)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
