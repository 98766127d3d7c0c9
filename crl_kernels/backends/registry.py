"""Which implementation runs, and why.

``torch.library`` chooses by device: the compiled libraries register CPU and CUDA kernels, and plain PyTorch is there
for every device that has none. This module loads the libraries and remembers what it found.

``CRL_KERNELS_BACKEND`` overrides: ``reference`` loads no library; ``cpu`` or ``cuda`` insists on that one.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

CHOICES = ("auto", "reference", "cpu", "cuda")
_REINSTALL = "Install torch and a C++ compiler, then install again with pip's --no-build-isolation."


@dataclass(frozen=True)
class Library:
    """A compiled library: the device it serves, whether it was loaded, and the reason in words."""

    device: str
    loaded: bool
    reason: str


def _load(device: str, file: str, unusable: str | None) -> Library:
    path = Path(__file__).parent.parent / file
    if unusable is not None:
        return Library(device, False, unusable)
    if not path.exists():
        return Library(device, False, f"{file} was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(device, False, f"{file} could not be loaded: {error}")
    return Library(device, True, f"{file} is loaded")


def load_libraries(choice: str) -> tuple[Library, Library]:
    """Loads what ``choice`` allows. An explicit choice that cannot run raises ImportError; ``auto`` falls back, and
    says so once."""
    if choice not in CHOICES:
        raise ImportError(f"CRL_KERNELS_BACKEND={choice!r}: expected one of {', '.join(CHOICES)}.")
    refused = "CRL_KERNELS_BACKEND=reference" if choice == "reference" else None
    no_cuda = "this torch is not a CUDA build" if torch.version.cuda is None else None
    cpu = _load("cpu", "_C.abi3.so", refused)
    cuda = _load("cuda", "_C_cuda.abi3.so", refused or no_cuda)
    for library in (cpu, cuda):
        if choice == library.device and not library.loaded:
            raise ImportError(f"CRL_KERNELS_BACKEND={choice}: {library.reason}. {_REINSTALL}")
    if choice == "auto" and not cpu.loaded:
        warnings.warn(
            f"crl_kernels runs in pure Python, which is slow: {cpu.reason}. {_REINSTALL} "
            "(CRL_KERNELS_BACKEND=reference silences this warning.)",
            stacklevel=2,
        )
    return cpu, cuda


CHOICE = os.environ.get("CRL_KERNELS_BACKEND", "auto")
CPU, CUDA = load_libraries(CHOICE)


def implementation(device_type: str) -> str:
    """The name of what runs for tensors on a device: ``C++``, ``CUDA`` or ``reference (plain PyTorch)``."""
    if device_type == "cpu" and CPU.loaded:
        return "C++"
    if device_type == "cuda" and CUDA.loaded:
        return "CUDA"
    return "reference (plain PyTorch)"
