"""Backends and builds: what is chosen, what is said, and that the package works without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from crl_kernels.backends import registry

ROOT = Path(__file__).parent.parent

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
    assert "CRL_KERNELS_BACKEND='tpu': expected one of auto, reference, cpu, cuda" in result.stderr
    for library in (registry.CPU, registry.CUDA):
        result = run("-c", "import crl_kernels", env=environment(CRL_KERNELS_BACKEND=library.device))
        assert (result.returncode == 0) == library.loaded
        assert library.loaded or f"CRL_KERNELS_BACKEND={library.device}: {library.reason}" in result.stderr


def test_the_report_says_what_runs():
    result = run("-m", "crl_kernels")
    assert result.returncode == 0, result.stderr
    for line in (f"cpu:  {registry.CPU.reason}", f"on cpu: {registry.implementation('cpu')}", "low_rank_projections"):
        assert line in result.stdout


def path_with(folder: Path, *tools: str) -> str:
    """A PATH that holds these tools only."""
    folder.mkdir()
    for tool in tools:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def source_copy(folder: Path) -> Path:
    """The sources without built libraries, so that nothing is picked up from here."""
    copy = folder / "source"
    for name in ("crl_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_installs_without_a_compiler_and_says_that_it_is_slow(tmp_path):
    source, target = source_copy(tmp_path), tmp_path / "target"
    path = path_with(tmp_path / "bin", "sh", "uname", "git")
    bare = {k: v for k, v in environment(PATH=path).items() if k not in ("CXX", "CC", "CUDA_HOME")}
    install = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    result = run(*install, env=bare)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no C++ compiler was found" in result.stdout + result.stderr
    assert not list(target.rglob("*.so"))

    result = run("-c", SCRIPT, env=environment(PYTHONPATH=str(target)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    value, gradient, file = result.stdout.split()
    assert [float(value), float(gradient)] == pytest.approx([64.0, 16.0], rel=1e-6)
    assert Path(file).is_relative_to(target)
    assert "crl_kernels runs in pure Python, which is slow: _C.abi3.so was not built" in result.stderr


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
