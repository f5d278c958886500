"""Memory: how much the process uses, and returning what it has freed. glibc would keep freed memory."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

from app.system.cgroups import ROOT, memory_limit_bytes

# From malloc.h.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 1 << 20
# Above this share of the limit, an alert fires; the kernel ends the process at 1.
MAX_SHARE = 0.9
# Reading it takes 8 ms per 500 MB, because the kernel visits every page.
MAX_AGE_SECONDS = 5.0


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


def used_bytes(root: Path = ROOT) -> int:
    """Return the memory that the process uses, where a page counts once however often it is mapped.

    Resident memory counts it once per mapping: with DTEM_SHARE_WEIGHTS, once per graph.
    """
    pss = _read_fields(root / "proc/self/smaps_rollup").get("Pss")
    # Without it, resident memory is the next best.
    return _read_fields(root / "proc/self/status").get("VmRSS", 0) if pss is None else pss


def free_bytes(root: Path = ROOT) -> int:
    """Return the memory that the process may still use, up to MAX_SHARE of its limit."""
    within_limit = round(MAX_SHARE * memory_limit_bytes(root)) - used_bytes(root)
    # Other processes of the machine count too.
    available = _read_fields(root / "proc/meminfo").get("MemAvailable", within_limit)
    return min(within_limit, available)


class MemoryGauge:
    """The memory used, read at most every few seconds."""

    def __init__(self, read: Callable[[], int] = used_bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._n_bytes, self._read_at = 0, float("-inf")

    def read(self) -> int:
        now = self._clock()
        if now - self._read_at > MAX_AGE_SECONDS:
            self._n_bytes, self._read_at = self._read(), now
        return self._n_bytes


def _read_fields(file: Path) -> dict[str, int]:
    """Read the lines `Name:   123 kB` of a file; empty if there is no such file. Units: bytes."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        # Not Linux, or an old one.
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in words}
