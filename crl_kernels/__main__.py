"""``python -m crl_kernels`` prints versions, devices, and the implementation of each operator, for bug reports;
``--version`` the package's version alone."""

import argparse
import importlib.metadata
import platform
import signal

import torch

from . import __version__
from .backends import registry
from .operators.definitions import NAMES


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m crl_kernels", description=__doc__)
    options.add_argument("--version", action="version", version=f"crl_kernels {__version__}")
    options.parse_args()
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    print(f"crl_kernels {__version__}")
    print(f"torch {torch.__version__} ({built_for if torch.version.cuda or torch.version.hip else 'CPU only'})")
    print(f"Triton {_triton_version()}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"CRL_KERNELS_BACKEND={registry.CHOICE}")
    print(f"CPU: {torch.get_num_threads()} threads")
    for gpu in _gpus() or ["none"]:
        print(f"GPU: {gpu}")

    width = max(map(len, NAMES))
    rows = [(name, registry.implementation("cpu", name), registry.implementation("cuda", name)) for name in NAMES]
    middle = max(len(cpu) for _, cpu, _ in rows)
    print()
    for name, cpu, cuda in [("operator", "on cpu", "on cuda"), *rows]:
        print(f"{name:{width}}  {cpu:{middle}}  {cuda}")

    print()
    for device in ("cpu", "cuda"):
        for reason in dict.fromkeys(registry.reason(device, name) for name in NAMES):
            print(f"on {device}: {reason}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pipe that is closed, as by `| head`, ends this quietly
    main()
