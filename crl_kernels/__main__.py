"""``python -m crl_kernels``: versions, what was built, and what runs where. Worth pasting into a bug report."""

import platform

import torch

from . import __version__
from ._ops import NAMES
from .backends import registry


def main() -> None:
    print(f"crl_kernels {__version__}, torch {torch.__version__}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"CRL_KERNELS_BACKEND={registry.CHOICE}")
    for library in (registry.CPU, registry.CUDA):
        print(f"  {library.device + ':':6}{library.reason}")
    print(f"operators: {', '.join(NAMES)}")
    for device in ("cpu", "cuda"):
        print(f"  on {device}: {registry.implementation(device)}")
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"GPU: {found}")


if __name__ == "__main__":
    main()
