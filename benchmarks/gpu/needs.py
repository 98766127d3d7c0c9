"""What a stage requires of the machine."""

import importlib.util
import shutil
from pathlib import Path


class Needs(Exception):
    """What a stage cannot do without, and this machine lacks."""


def packages(*names: str) -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise Needs(f"{', '.join(missing)}, not installed")


def program(name: str) -> str:
    """Its path; CUDA's own folder need not be on PATH."""
    cuda = Path("/usr/local/cuda/bin", name)
    path = shutil.which(name) or (str(cuda) if cuda.exists() else None)
    if path is None:
        raise Needs(f"{name}, not on PATH")
    return path
