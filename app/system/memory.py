"""Memory: return freed memory to the system. glibc would keep it; with another C library this does nothing."""

import contextlib
import ctypes
import gc

# From malloc.h.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Return large blocks, such as images, to the system as soon as they are freed.

    By default glibc raises its threshold with each large block that is freed, and keeps 1 GB after a few of 50 Mpx.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def return_freed_memory() -> None:
    """Return all free memory now: a dropped model version leaves hundreds of MB in small blocks.

    Collect garbage first: a traceback can keep a version in a reference cycle, and old objects are rarely collected.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
