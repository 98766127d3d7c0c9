"""Backends and builds: what is chosen, what is said, and that the package works without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from crl_kernels.backends import registry
from crl_kernels.operators import definitions

ROOT = Path(__file__).parents[2]
needs_source = pytest.mark.skipif(not (ROOT / "crl_kernels").exists(), reason="needs the package's source")

SCRIPT = """
import torch, crl_kernels as ck
model = torch.nn.Linear(3, 2)
history = ck.LowRankHistory(model)
mu = {n: torch.ones_like(p) for n, p in model.named_parameters()}
history.append(ck.LowRankFisher.from_mean_gradient(mu, 2.0, {n: p.detach() - 1 for n, p in model.named_parameters()}))
value = ck.rank1_ewc_penalty(history, lam=1.0)
value.backward()
print(value.item(), float(model.bias.grad[0]), ck.__file__)
"""


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "CRL_KERNELS_BACKEND"} | changes


def test_reference_backend_can_be_chosen_and_is_quiet():
    result = run("-W", "error::UserWarning", "-c", SCRIPT, env=environment(CRL_KERNELS_BACKEND="reference"))
    assert result.returncode == 0, result.stderr
    # mu . (theta - theta*) = 8 in eight coordinates: (1 / 2) 2 (8)^2, and 2 * 8 * 1 in the gradient.
    assert [float(x) for x in result.stdout.split()[:2]] == pytest.approx([64.0, 16.0], rel=1e-6)


def test_a_backend_that_cannot_run_raises():
    result = run("-c", "import crl_kernels", env=environment(CRL_KERNELS_BACKEND="tpu"))
    assert "CRL_KERNELS_BACKEND='tpu': expected one of auto, reference, cpu, cuda, triton" in result.stderr
    for name, library in (("cpu", registry.CPU), ("cuda", registry.CUDA), ("triton", registry.TRITON)):
        result = run("-c", "import crl_kernels", env=environment(CRL_KERNELS_BACKEND=name))
        assert (result.returncode == 0) == library.loaded
        assert library.loaded or f"CRL_KERNELS_BACKEND={name}: {library.reason}" in result.stderr


def test_the_report_says_what_runs_and_why():
    result = run("-m", "crl_kernels")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    for name in definitions.NAMES:
        runs = [registry.implementation(device, name) for device in ("cpu", "cuda")]
        assert [name, *" ".join(runs).split()] in lines
    for device, library in (("cpu", registry.CPU), ("cuda", registry.CUDA)):
        assert f"on {device}: {library.reason}" in result.stdout


FIND_TRITON = """
import warnings
from crl_kernels.backends import reference, registry
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    operators = [registry._gpu_operators() for _ in range(2)]
print(len(caught), operators[0].__name__, registry.implementation("cuda"), registry.reason("cuda", "diagonal_shrink_"))
for warning in caught:
    print(warning.message)
"""


def test_import_loads_no_slow_library():
    result = run("-c", "import crl_kernels, sys; print({'torch._dynamo', 'triton', 'matplotlib'} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stdout + result.stderr


needs_triton = pytest.mark.skipif(not registry.TRITON.loaded, reason=f"no Triton: {registry.TRITON.reason}")


@needs_triton
def test_triton_is_imported_only_when_a_gpu_needs_it():
    result = run("-c", "import crl_kernels, sys; print('triton' in sys.modules)", env=environment())
    assert result.stdout == "False\n", result.stderr
    result = run("-c", FIND_TRITON, env=environment())
    assert result.stdout.startswith("0 crl_kernels.backends.triton.operators "), result.stderr


@needs_triton
@needs_source
def test_without_triton_a_gpu_runs_plain_pytorch_and_says_so_once(tmp_path):
    """Without Triton; with a Triton that cannot be imported; without the C compiler that it needs."""
    source = str(source_copy(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "triton.py").write_text("raise ImportError('libtriton.so is damaged')")
    broken = os.pathsep.join([str(tmp_path / "broken"), source])
    without = "import sys; sys.modules['triton'] = None"
    bare = {"PATH": path_with(tmp_path / "bin"), "CC": "no-such-compiler"}
    for first, changes, why in (
        (without, {}, "Triton is not installed"),
        ("", {"PYTHONPATH": broken}, "Triton could not be imported: libtriton.so is damaged"),
        ("", bare, "Triton needs a C compiler when it runs"),
    ):
        there = {"env": environment(PYTHONPATH=source) | changes, "cwd": tmp_path}
        result = run("-c", f"{first}\n{FIND_TRITON}", **there)
        assert result.returncode == 0, result.stderr
        chosen, warning = result.stdout.splitlines()
        assert chosen.startswith("1 crl_kernels.backends.reference reference (plain PyTorch) "), chosen
        assert why in chosen
        assert "crl_kernels runs in plain PyTorch on the GPU, which is slow" in warning
        assert why in warning
        there["env"]["CRL_KERNELS_BACKEND"] = "triton"
        result = run("-c", f"{first}\nimport crl_kernels", **there)
        assert f"ImportError: CRL_KERNELS_BACKEND=triton: {why}" in result.stderr


def path_with(folder: Path, *tools: str) -> str:
    """A PATH that holds these tools only."""
    folder.mkdir()
    for tool in tools:
        if executable := shutil.which(tool):
            (folder / tool).symlink_to(executable)
    return str(folder)


def source_copy(folder: Path) -> Path:
    """The sources without built libraries, so that nothing is picked up from here."""
    copy = folder / "source"
    for name in ("crl_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def files(package: Path) -> set[Path]:
    """Modules, `py.typed`, templates: all files of a package but compiled ones."""
    return {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@needs_source
def test_installs_without_a_compiler_and_says_that_it_is_slow(tmp_path):
    source, target = source_copy(tmp_path), tmp_path / "target"
    path = path_with(tmp_path / "bin", "sh", "uname", "git")
    bare = {k: v for k, v in environment(PATH=path).items() if k not in ("CXX", "CC", "CUDA_HOME")}
    install = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    result = run(*install, env=bare)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no C++ compiler was found" in result.stdout + result.stderr
    assert not list(target.rglob("*.so"))
    for package in (source / "crl_kernels", source / "python" / "crl_diffusion"):
        assert files(package) == files(target / package.name)
        assert (target / package.name / "py.typed").exists()

    result = run("-c", SCRIPT, env=environment(PYTHONPATH=str(target)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    value, gradient, file = result.stdout.split()
    assert [float(value), float(gradient)] == pytest.approx([64.0, 16.0], rel=1e-6)
    assert Path(file).is_relative_to(target)
    assert "crl_kernels runs in pure Python, which is slow: _C.abi3.so was not built" in result.stderr


@needs_source
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which is looked for before nvcc")
def test_cuda_kernels_that_cannot_be_built_are_an_error(tmp_path):
    source = source_copy(tmp_path)
    bare = {k: v for k, v in environment().items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    bare["PATH"] = path_with(tmp_path / "bin", "sh", "uname", "git", "g++")
    result = run("setup.py", "--version", cwd=source, env=bare | {"CRL_KERNELS_CUDA": "1"})
    assert result.returncode != 0
    assert "nvcc was not found" in result.stderr
    assert "Install the CUDA toolkit" in result.stderr
    result = run("setup.py", "--version", cwd=source, env=bare | {"CRL_KERNELS_CUDA": "yes"})
    assert result.returncode != 0
    assert "CRL_KERNELS_CUDA='yes': expected auto, 1 or 0" in result.stderr


@needs_source
def test_a_source_distribution_has_all_that_it_takes_to_build(tmp_path):
    source = source_copy(tmp_path)
    shutil.copy(ROOT / "MANIFEST.in", source)
    result = run("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()} <= packed
    assert not [name for name in packed if name.endswith(".so")]
