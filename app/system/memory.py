"""Memory: what glibc would keep of what was freed. Another C library has no such habit, and then this does nothing."""

import contextlib
import ctypes
import gc

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Let freed pictures go back to the system from now on.

    glibc raises its threshold with every large block that is freed, and then keeps them: 1 GB after a few of 50 Mpx.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def return_freed_memory() -> None:
    """Give back what is free now: a model version that was dropped leaves hundreds of MB in small pieces.

    The collector comes first: a traceback is enough to hold a version in a cycle, and it seldom looks at what is old.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
