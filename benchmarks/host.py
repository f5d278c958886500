"""The machine of a measurement."""

from __future__ import annotations

import os
import platform
from typing import Any


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


def describe_host() -> dict[str, Any]:
    """Return cores, machine type, Python version and load averages, for a report."""
    load = [round(value, 2) for value in os.getloadavg()]
    return {"cores": n_cores(), "machine": platform.machine(), "python": platform.python_version(), "load": load}
