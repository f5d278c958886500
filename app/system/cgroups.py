"""Control groups: the CPU and memory limits of this container, by version 1 or 2 of the Linux interface."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Parent folder of `proc` and `sys`.
ROOT = Path("/")


def count_cpus(root: Path = ROOT) -> int:
    """Return the number of CPUs that affinity and quota allow.

    More threads than the quota would use it up early, and all of them would stop for the rest of each period.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for group in _find_groups(root, "cpu"):
        words = _read(group / "cpu.max") or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
        # Unlimited is `max` or -1.
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            quotas.append(math.ceil(int(words[0]) / int(words[1])))
    return min([affinity, *quotas])


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the memory limit, or the machine's memory without one."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _find_groups(root, "memory"):
        words = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdecimal()]
    return min(limits)


def _find_groups(root: Path, controller: str) -> Iterator[Path]:
    """List the folders of our group and its ancestors. In a container, some of them may not exist."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        # Not Linux.
        return
    for line in lines:
        # Version 2 has one hierarchy for all controllers, and leaves the name empty.
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") or not controllers:
            group = Path(path.lstrip("/"))
            yield from (root / "sys/fs/cgroup" / controllers / folder for folder in (group, *group.parents))


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
