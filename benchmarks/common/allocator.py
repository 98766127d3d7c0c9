"""glibc returns temporaries above 32 MiB to the system when they are freed, and the next call faults them in again. A
user of such code pays for that, unless the heap has a hole where they fit. So rows are measured with the system's
allocator, and once more with freed memory kept, where every row is at its best."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_SMALL = 1 << 16


def keep_freed_memory() -> bool:
    """For the rest of the process; False where the C library has no such switch."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
    """The opposite, so that the process holds live memory only: every block of 64 KiB or more has a mapping of its own,
    which goes when the block is freed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    switches = ((_M_MMAP_MAX, 1 << 16), (_M_MMAP_THRESHOLD, _SMALL), (_M_TRIM_THRESHOLD, _SMALL))
    return all(libc.mallopt(switch, value) for switch, value in switches)
