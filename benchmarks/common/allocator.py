"""glibc gives temporaries above 32 MiB back to the system when they are freed, and faults them in again at the next
call, page by page. That is what a user of such code pays, unless something else in the process has left a hole that
they fit; so rows are measured with the system's allocator, and once more with freed memory kept, which is every row at
its best."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_SMALL = 1 << 16


def keep_freed_memory() -> bool:
    """From now on; False where the C library has no such switch."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
    """The opposite, so that what the process holds is what is alive: every block of 64 KiB or more is mapped for
    itself, and unmapped when it is freed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    switches = ((_M_MMAP_MAX, 1 << 16), (_M_MMAP_THRESHOLD, _SMALL), (_M_TRIM_THRESHOLD, _SMALL))
    return all(libc.mallopt(switch, value) for switch, value in switches)
