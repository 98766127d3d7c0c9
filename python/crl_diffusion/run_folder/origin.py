"""Where a run comes from: versions of packages, the state of the source code, the command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("crl-kernels", "diffusers", "torchmetrics", "torchvision", "scikit-learn", "numpy")


def environment() -> dict[str, Any]:
    """Versions of Python, torch and the packages that decide numbers, and the number of threads."""
    versions: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    versions["torch"] = torch.__version__
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["threads"] = torch.get_num_threads()
    return versions


def differences(saved: Mapping[str, Any]) -> str:
    """What differs between the environment in which a run began and this one, with both values; "" if nothing does.
    The kernel, which is part of the platform, and names that only one of them has do not count."""
    here = {name: value for name, value in environment().items() if name != "platform"}
    return ", ".join(
        f"{name} {saved[name]} then, {here[name]} now" for name in here if saved.get(name, here[name]) != here[name]
    )


def command_line() -> str:
    """The command line of this process, for a shell."""
    return shlex.join(sys.orig_argv)


def git_state(file: Path = Path(__file__)) -> dict[str, Any] | None:
    """The commit that a source file belongs to, and whether its folder differs from it; None unless git keeps it.

    The files of an installed package are not kept by git, even if the environment lies inside a checkout.
    """
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit, changes = _git(file, "rev-parse", "HEAD"), _git(file, "status", "--porcelain", "--", ":/*.py", ":/csrc")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(file.resolve().parent), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
