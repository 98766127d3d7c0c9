"""The module crl_core: csrc/core and the loops of csrc/cpu, compiled for these tests into a temporary folder."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def run(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def build_core(tmp_path_factory):
    """build_core(name, *options) compiles crl_core with these options of g++ and returns its folder."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11")
    import torch
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # one build for all workers
    paths = (CSRC, Path(torch.__file__).parent / "include", pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{path}" for path in paths]
    sources = [HERE / "crl_core.cpp", CSRC / "cpu" / "dispatch.cpp", *sorted((CSRC / "cpu").glob("loops_*.cpp"))]

    def build(name: str, *options: str) -> Path:
        folder = shared / name
        library = folder / "crl_core.so"

        def object_of(source: Path) -> Path:
            target = folder / f"{source.stem}.o"
            run(compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", *options, *includes, "-c", source, "-o", target)
            return target

        with FileLock(shared / f"{name}.lock"):
            if not library.exists():
                folder.mkdir(exist_ok=True)
                with ThreadPoolExecutor(2) as pool:
                    objects = list(pool.map(object_of, sources))
                run(compiler, "-shared", *options, *objects, "-o", library)
        return folder

    return build


@pytest.fixture(scope="session")
def core(request):
    """The module; where PYTHONPATH has one already, as in the runs that test_sanitizers.py starts, it is that one."""
    if importlib.util.find_spec("crl_core") is None:
        sys.path.insert(0, str(request.getfixturevalue("build_core")("core", "-O1", "-Wall", "-Wno-psabi")))
        importlib.invalidate_caches()
    return importlib.import_module("crl_core")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def loops(request, core):
    if request.param not in core.LOOPS:
        pytest.skip(f"needs a processor with {request.param}")
    return core.LOOPS[request.param]
