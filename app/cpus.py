"""CPUs: how many this process may keep busy. A container's share is a quota, which the affinity knows nothing of."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # in a container, its own group is the root


def count_cpus(cgroups: Path = CGROUPS) -> int:
    """Count the CPUs of our affinity, or fewer if a quota allows no more: threads beyond it are stopped for the rest
    of each period, all at once.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_quota(cgroups)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def _read_quota(cgroups: Path) -> float | None:
    """Read how many CPUs' time the group has; None if it has no bound, or none that can be read."""
    for quota, period in (
        ("cpu.max", None),  # version 2, both in one file
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
        ("cpu,cpuacct/cpu.cfs_quota_us", "cpu,cpuacct/cpu.cfs_period_us"),
    ):
        try:
            words = " ".join((cgroups / name).read_text(encoding="ascii") for name in (quota, period) if name).split()
            used, per = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # there is no such file, or it says `max`
            continue
        if used > 0 and per > 0:
            return used / per
    return None
