"""Lines on stderr. Without a package of the extra `trainer`, this file can still be imported, and say so."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from crl_diffusion.errors import visible


def complain(line: str) -> None:
    """Print a line on stderr. A terminal that has hung up is ignored."""
    with suppress(OSError):
        print(f"crl-diffusion: {visible(line)}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, which prints for all; also before torch is imported."""
    return (os.environ.get("RANK") or "0") == "0"
