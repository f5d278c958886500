"""Control groups: what the container that we are in may use of its machine, by either version of Linux's interface."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # where `proc` and `sys` are


def count_cpus(root: Path = ROOT) -> int:
    """Count the CPUs of our affinity, or fewer where a quota allows no more: threads beyond it are all stopped for the
    rest of each period.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for group in _find_groups(root, "cpu"):
        words = _read(group / "cpu.max") or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # no bound is `max`, or -1
            quotas.append(math.ceil(int(words[0]) / int(words[1])))
    return min([affinity, *quotas])


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the memory that we may use; without a limit, the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _find_groups(root, "memory"):
        words = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdecimal()]
    return min(limits)


def _find_groups(root: Path, controller: str) -> Iterator[Path]:
    """List the folders of our group and of those around it; inside a container some of them cannot be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 has one hierarchy for all controllers, without a name
        if controller in controllers.split(",") or not controllers:
            group = Path(path.lstrip("/"))
            yield from (root / "sys/fs/cgroup" / controllers / folder for folder in (group, *group.parents))


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
