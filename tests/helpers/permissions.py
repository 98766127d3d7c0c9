"""Files that may not be read or written, for root as well, as whom tests may run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522  # of Linux's capget and capset
_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def permissions_hold() -> Iterator[None]:
    """The modes of files bind this thread within the block. The test is skipped on systems where root cannot give up
    its right to override them."""
    if os.name != "posix" or os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root overrides permissions, and only Linux's capset can end that")
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, before)
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] &= ~_OVERRIDES  # the effective capabilities 0 to 31
    if libc.capset(header, after):
        pytest.skip(f"capset failed: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.capset(header, before)
