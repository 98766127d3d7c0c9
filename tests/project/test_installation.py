"""Backends and builds: what is chosen, what is said, and that the package works without a compiler."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from crl_kernels import __version__
from crl_kernels.backends import built, registry
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


def test_an_empty_variable_is_an_unset_one():
    code = (
        "import torch, crl_kernels; from crl_kernels.backends.registry import CHOICE; "
        "x = [torch.ones(3)]; print(CHOICE, float(torch.ops.crl_kernels.low_rank_projections(x, x, 1)))"
    )
    result = run("-c", code, env=environment(CRL_KERNELS_BACKEND="", CRL_KERNELS_ISA=""))
    assert result.stdout.split() == ["auto", "3.0"], result.stderr


def test_the_report_says_what_runs_and_why():
    result = run("-m", "crl_kernels")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    for name in definitions.NAMES:
        runs = [registry.implementation(device, name) for device in ("cpu", "cuda")]
        assert [name, *" ".join(runs).split()] in lines
    for device, library in (("cpu", registry.CPU), ("cuda", registry.CUDA)):
        assert f"on {device}: {library.reason}" in result.stdout


def test_the_report_has_a_version_and_ends_quietly_when_its_reader_has_read_enough():
    assert run("-m", "crl_kernels", "--version").stdout == f"crl_kernels {__version__}\n"
    with subprocess.Popen(
        [sys.executable, "-m", "crl_kernels"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE


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


NOT_SOURCE = shutil.ignore_patterns("*.so", built.RECORD, "__pycache__", "*.egg-info")


def source_copy(folder: Path) -> Path:
    """The sources without built libraries, so that nothing is picked up from here."""
    copy = folder / "source"
    for name in ("crl_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_SOURCE)
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
        assert files(package) == files(target / package.name) - {Path(built.RECORD)}
        assert (target / package.name / "py.typed").exists()

    result = run("-c", SCRIPT, env=environment(PYTHONPATH=str(target)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    value, gradient, file = result.stdout.split()
    assert [float(value), float(gradient)] == pytest.approx([64.0, 16.0], rel=1e-6)
    assert Path(file).is_relative_to(target)
    assert (
        "crl_kernels runs in pure Python, which is slow: _C.abi3.so was not built: no C++ compiler was found (CXX, g++ "
        'or c++). To build it, with a C++ compiler: pip install "setuptools>=77" ninja && pip install '
        "--no-build-isolation FOLDER_OF_THE_SOURCE (CRL_KERNELS_BACKEND=reference silences this warning.)"
    ) in result.stderr


@needs_source
def test_torch_that_a_build_lacks_is_an_error_that_says_what_to_type(tmp_path):
    """A build of pure Python is never made by accident, only asked for."""
    source = source_copy(tmp_path)
    (tmp_path / "without").mkdir()
    no_torch = tmp_path / "without" / "torch.py"
    no_torch.write_text("raise ImportError('no torch here')")
    there = {"cwd": source, "env": environment(PYTHONPATH=str(no_torch.parent))}
    for content, why in (
        ("raise ImportError('no torch here')", "torch, which cannot be imported (no torch here)"),
        (OLD_TORCH, "This torch is 2.9.1; expected 2.10 or later"),
    ):
        no_torch.write_text(content)
        result = run("setup.py", "--version", **there)
        assert result.returncode == 1
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
        assert (
            'Type: pip install "torch>=2.10" "setuptools>=77" ninja && pip install --no-build-isolation .'
            in result.stderr
        )
    there["env"] |= {"CRL_KERNELS_PURE_PYTHON": "1", "CRL_KERNELS_CUDA": ""}  # empty is unset
    leftover = tmp_path / "built" / "crl_kernels" / "_C_cuda.abi3.so"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    result = run("setup.py", "-q", "build", "--build-lib", str(tmp_path / "built"), **there)
    assert result.returncode == 0, result.stderr
    assert not leftover.exists()  # of an earlier build, and perhaps of other sources
    result = run("-c", "import crl_kernels", cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path / "built")))
    assert "_C.abi3.so was not built: CRL_KERNELS_PURE_PYTHON=1. To build it" in result.stderr
    there["env"]["CRL_KERNELS_PURE_PYTHON"] = "yes"
    assert "CRL_KERNELS_PURE_PYTHON='yes': expected 0 or 1." in run("setup.py", "--version", **there).stderr


OLD_TORCH = """
import sys, types
from importlib.metadata import version
class TorchVersion(str):
    def __lt__(self, other):
        return tuple(map(int, self.split("."))) < tuple(map(int, other.split(".")))
__version__, __path__ = TorchVersion("2.9.1"), []
utils, extension = types.ModuleType("torch.utils"), types.ModuleType("torch.utils.cpp_extension")
extension.BuildExtension = extension.CppExtension = extension.CUDAExtension = None
sys.modules["torch.utils"], sys.modules["torch.utils.cpp_extension"] = utils, extension
"""


@pytest.fixture
def site(tmp_path):
    """A folder of Python's path in which this package is installed with its C++ library."""
    library = built.find("_C.abi3.so")
    if isinstance(library, str):
        pytest.skip(library)
    package = tmp_path / "site" / "crl_kernels"
    package.mkdir(parents=True)
    for file in (library, library.with_name(built.RECORD)):
        shutil.copy(file, package)
    return package.parent


def report_in(folder: Path, path: Path | str = "") -> tuple[str, str]:
    """Output and errors of ``python -m crl_kernels`` in a checkout, whose folder Python's path has first."""
    result = run("-m", "crl_kernels", cwd=folder, env=environment(PYTHONPATH=str(path)))
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@needs_source
def test_a_checkout_that_is_not_built_runs_the_kernels_that_are_installed(tmp_path, site):
    source = source_copy(tmp_path)
    output, errors = report_in(source, site)
    assert f"on cpu: {site / 'crl_kernels' / '_C.abi3.so'} is loaded" in output
    assert " C++ " in output
    assert errors == ""
    result = run("-c", SCRIPT, cwd=source, env=environment(PYTHONPATH=str(site)))
    assert Path(result.stdout.split()[2]).is_relative_to(source)  # the checkout's Python, the other one's library


@needs_source
@pytest.mark.parametrize("place", ["installed", "in the checkout"])
@pytest.mark.parametrize("other", ["sources", "no record", "torn record"])
def test_a_library_of_other_sources_is_not_loaded(tmp_path, site, place, other):
    source = source_copy(tmp_path)
    package = site / "crl_kernels"
    if place == "in the checkout":
        for file in package.iterdir():
            shutil.move(file, source / "crl_kernels")
        package = source / "crl_kernels"
    if other == "sources":
        with open(source / "csrc" / "cpu" / "penalty.cpp", "a") as file:
            file.write("// changed\n")
    elif other == "no record":
        (package / built.RECORD).unlink()
    else:
        (package / built.RECORD).write_text((package / built.RECORD).read_text()[:20])
    output, errors = report_in(source, site)
    why = f"{package / '_C.abi3.so'} was not built from the sources that are now in {source / 'csrc'}"
    assert f"on cpu: {why}" in output
    assert f"crl_kernels runs in pure Python, which is slow: {why}. To build it" in errors
    assert f'pip install "setuptools>=77" ninja && pip install --no-build-isolation {source} (' in errors
    # One that fits is taken all the same.
    if place == "in the checkout" and other == "sources":
        (site / "crl_kernels").mkdir(exist_ok=True)
        shutil.copy(package / "_C.abi3.so", site / "crl_kernels")
        digest = built.sources_digest(source / "csrc")
        (site / "crl_kernels" / built.RECORD).write_text(json.dumps({"sources": digest, "left_out": {}}))
        assert f"on cpu: {site / 'crl_kernels' / '_C.abi3.so'} is loaded" in report_in(source, site)[0]


@needs_source
def test_a_checkout_without_any_kernels_says_what_to_type(tmp_path):
    source = source_copy(tmp_path)
    output, errors = report_in(source)
    if built.PACKAGE.parent.name == "site-packages":
        pytest.skip("this package is installed, and its kernels serve every checkout")
    assert "on cpu: _C.abi3.so was not built\n" in output
    assert f"pip install --no-build-isolation {source} (" in errors


@needs_source
def test_the_digest_is_of_names_and_contents(tmp_path):
    digests = []
    for changes in ({}, {"a.h": "2"}, {"b.h": "1"}, {"deep/a.h": "1"}, {"notes.txt": "1"}):
        folder = tmp_path / str(len(digests))
        (folder / "deep").mkdir(parents=True)
        for name, text in ({"a.h": "1"} | changes).items():
            (folder / name).write_text(text)
        digests.append(built.sources_digest(folder))
    assert len(set(digests[:4])) == 4
    assert digests[4] == digests[0]


@needs_source
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which is looked for before nvcc")
def test_cuda_kernels_that_cannot_be_built_are_an_error(tmp_path):
    source = source_copy(tmp_path)
    bare = {k: v for k, v in environment().items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    bare |= {"PATH": path_with(tmp_path / "bin", "sh", "uname", "git", "g++"), "CXX": ""}  # empty is unset
    result = run("setup.py", "--version", cwd=source, env=bare | {"CRL_KERNELS_CUDA": "1"})
    assert result.returncode != 0
    assert "nvcc was not found" in result.stderr
    assert "Install the CUDA toolkit" in result.stderr
    result = run("setup.py", "--version", cwd=source, env=bare | {"CRL_KERNELS_CUDA": "yes"})
    assert result.returncode != 0
    assert "CRL_KERNELS_CUDA='yes': expected auto, 1 or 0" in result.stderr


@needs_source
def test_a_source_distribution_has_all_that_it_takes_to_build_and_to_test(tmp_path):
    source = source_copy(tmp_path)
    for name in (*SDIST_FILES, "crl_kernels/_C.abi3.so", "crl_kernels/_build.json"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=NOT_SOURCE)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    result = run("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    for name in ("csrc", "crl_kernels", "python", *SDIST_FILES):
        paths = [source / name, *(source / name).rglob("*")]
        wanted = {str(path.relative_to(source)) for path in paths if path.is_file() and not built_here(path)}
        assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if name.endswith((".so", ".pyc", built.RECORD))]


# What the tests read, beside the packages.
SDIST_FILES = (
    *(".ci", ".github", "benchmarks", "docs", "tests", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
    *("MANIFEST.in", "Makefile", "SECURITY.md", "mkdocs.yml", "mkdocs_hooks.py"),
)


def built_here(path: Path) -> bool:
    return path.suffix in (".so", ".pyc") or path.name == built.RECORD or "egg-info" in str(path)
