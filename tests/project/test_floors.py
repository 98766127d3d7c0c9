"""The floors: few files beside them, every one of them in the wheel, imports that go down only."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"crl_kernels": ROOT / "crl_kernels", "crl_diffusion": ROOT / "python" / "crl_diffusion"}


@pytest.mark.parametrize(("name", "most"), [("crl_kernels", 8), ("crl_diffusion", 9)])
def test_few_files_stand_beside_the_floors(name: str, most: int) -> None:
    assert len(list(PACKAGES[name].glob("*.py"))) <= most


@pytest.mark.parametrize("name", PACKAGES)
def test_a_floor_is_a_package_with_a_purpose(name: str) -> None:
    folders = {path.parent for path in PACKAGES[name].rglob("*.py")}
    for folder in folders:
        assert (folder / "__init__.py").read_text().startswith('"""'), f"{folder} does not say what it is for"


def test_imports_go_down_and_never_in_a_circle() -> None:
    """The contracts of pyproject.toml, imports inside of functions included."""
    try:
        importlib.metadata.version("import-linter")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("import-linter is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
