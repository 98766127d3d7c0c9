"""Which implementation runs each operator on each device, and why.

``torch.library`` chooses by device. On a CPU: C++ where it is built, else plain PyTorch. On a GPU: the compiled CUDA
library where it is built, else Triton, else plain PyTorch. On every other device: plain PyTorch. This module loads the
compiled libraries and registers Triton for the operators that they lack. Triton itself is imported at the first call on
a GPU.

``CRL_KERNELS_BACKEND`` overrides: ``reference`` allows plain PyTorch only; ``cpu``, ``cuda`` or ``triton`` insists on
that one. With ``triton`` and ``TRITON_INTERPRET=1``, Triton's interpreter serves CPU tensors too: slow, for tests.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import built, reference

CHOICES = ("auto", "reference", "cpu", "cuda", "triton")
_BUILD = f"To build it, with a C++ compiler: {built.reinstall()}"
_REFERENCE = "reference (plain PyTorch)"
# The CUDA library does not have these.
TRITON_ON_GPUS = ("sample_weight_gradients", "sample_gradient_stats", "sample_gram")


@dataclass(frozen=True)
class Library:
    """One way to run the operators: the device it serves, whether it was loaded (Triton: can be), and the reason in
    words."""

    device: str
    loaded: bool
    reason: str


def _load(device: str, file: str, unusable: str | None) -> Library:
    if unusable is not None:
        return Library(device, False, unusable)
    path = built.find(file)
    if isinstance(path, str):
        return Library(device, False, path)
    name = file if path.parent == built.PACKAGE else str(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(device, False, f"{name} could not be loaded: {error}")
    return Library(device, True, f"{name} is loaded")


def _triton_obstacle(interpreted: bool) -> str | None:
    """Why Triton cannot run, as far as this is known without importing it; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for neither CUDA nor ROCm"
    if os.name != "posix":
        return None
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "Triton needs a C compiler when it runs, and none was found (CC, gcc or clang)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python's C headers when it runs, and Python.h was not found (python3-dev, python3-devel)"
    return None


@functools.cache
def _triton_operators() -> ModuleType | str:
    """The operators in Triton, or why they could not be imported."""
    try:
        from .triton import operators
    except ImportError as error:
        return f"Triton could not be imported: {error}"
    return operators


def _find_triton(unusable: str | None, interpreted: bool) -> Library:
    obstacle = unusable or _triton_obstacle(interpreted)
    reason = obstacle or ("Triton's interpreter" if interpreted else "Triton is installed")
    return Library("cuda", obstacle is None, reason)


def load_libraries(choice: str) -> tuple[Library, Library, Library]:
    """(CPU, CUDA, Triton): loads what ``choice`` allows. An explicit choice that cannot run raises ImportError;
    ``auto`` falls back, with one warning."""
    if choice not in CHOICES:
        raise ImportError(f"CRL_KERNELS_BACKEND={choice!r}: expected one of {', '.join(CHOICES)}.")
    refused = "CRL_KERNELS_BACKEND=reference" if choice == "reference" else None
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    no_cpu = "CRL_KERNELS_BACKEND=triton and TRITON_INTERPRET=1" if interpreted else None
    no_cuda = "this torch is not a CUDA build" if torch.version.cuda is None else None
    chosen = "CRL_KERNELS_BACKEND=triton" if choice == "triton" else None
    cpu = _load("cpu", "_C.abi3.so", refused or no_cpu)
    cuda = _load("cuda", "_C_cuda.abi3.so", refused or chosen or no_cuda)
    triton = _find_triton(refused, interpreted)
    for name, library in (("cpu", cpu), ("cuda", cuda)):
        if choice == name and not library.loaded:
            raise ImportError(f"CRL_KERNELS_BACKEND={choice}: {library.reason}. {_BUILD}")
    if choice == "triton":
        operators = _triton_operators() if triton.loaded else triton.reason
        if isinstance(operators, str):
            raise ImportError(f"CRL_KERNELS_BACKEND=triton: {operators}. Install what is missing, or choose another.")
    if choice == "auto" and not cpu.loaded:
        warnings.warn(
            f"crl_kernels runs in pure Python, which is slow: {cpu.reason}. {_BUILD} "
            "(CRL_KERNELS_BACKEND=reference silences this warning.)",
            stacklevel=2,
        )
    return cpu, cuda, triton


CHOICE = os.environ.get("CRL_KERNELS_BACKEND") or "auto"
CPU, CUDA, TRITON = load_libraries(CHOICE)
INTERPRETED = CHOICE == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _gpu_operators() -> ModuleType:
    """The operators on a GPU without a compiled kernel. Called when there are tensors on a GPU, so a warning concerns a
    device that is present."""
    operators = _triton_operators() if TRITON.loaded else TRITON.reason
    if isinstance(operators, ModuleType):
        return operators
    warnings.warn(
        f"crl_kernels runs in plain PyTorch on the GPU, which is slow: {CUDA.reason}; {operators}. "
        "(CRL_KERNELS_BACKEND=reference silences this warning.)",
        stacklevel=4,
    )
    return reference


def _on_gpu(name: str) -> Callable[..., Any]:
    def operator(*arguments: Any) -> Any:
        return getattr(_gpu_operators(), name)(*arguments)

    return operator


_library = torch.library.Library("crl_kernels", "IMPL")
_registered: set[tuple[str, str]] = set()  # (device, operator)


def _has_kernel(device_type: str, operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"crl_kernels::{operator}", device_type.upper())


def register(names: Sequence[str]) -> None:
    """Registers an implementation for operators without a compiled kernel; called once all are defined."""
    gpu_build = torch.version.cuda is not None or torch.version.hip is not None
    devices = ["cuda"] if gpu_build and CHOICE != "reference" else []
    for device in devices + ["cpu"] * INTERPRETED:
        for name in names:
            if not _has_kernel(device, name):
                _library.impl(name, _on_gpu(name), device.upper())
                _registered.add((device, name))


def implementation(device_type: str, operator: str = "low_rank_projections") -> str:
    """The name of an operator's implementation for tensors on a device: ``C++``, ``CUDA``, ``Triton``, ``Triton
    (interpreted)`` or ``reference (plain PyTorch)``."""
    if (device_type, operator) not in _registered:
        compiled = {"cpu": CPU, "cuda": CUDA}.get(device_type)
        if compiled is not None and compiled.loaded and _has_kernel(device_type, operator):
            return {"cpu": "C++", "cuda": "CUDA"}[device_type]
        return _REFERENCE
    if TRITON.loaded and isinstance(_triton_operators(), ModuleType):
        return "Triton (interpreted)" if INTERPRETED else "Triton"
    return _REFERENCE


def reason(device_type: str, operator: str) -> str:
    """Why that implementation runs: the reason for each one, in order of preference, up to it."""
    compiled = {"cpu": CPU, "cuda": CUDA}[device_type]
    name = implementation(device_type, operator)
    if name in ("C++", "CUDA"):
        return compiled.reason
    compiled_reason = compiled.reason
    if compiled.loaded and device_type == "cuda" and operator in TRITON_ON_GPUS:
        compiled_reason += f", which leaves {operator} to Triton"
    elif compiled.loaded:
        compiled_reason += f", without {operator}: build it again"
    triton_reason = None
    if device_type == "cuda" or INTERPRETED:
        operators = _triton_operators() if TRITON.loaded else TRITON.reason
        triton_reason = operators if isinstance(operators, str) else TRITON.reason
    return "; ".join(dict.fromkeys([compiled_reason, triton_reason] if triton_reason else [compiled_reason]))
