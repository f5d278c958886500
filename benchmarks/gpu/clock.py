"""Timing of what a GPU does: the clock waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.size import Device

MAX_CALLS = 50


def clock_of(device: Device) -> Callable[[], float]:
    """Return a clock in seconds that is read when the device has nothing left to do."""
    return time.perf_counter if device == "cpu" else _synchronised


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def n_calls_of(run: Callable[[], object], least_seconds: float, clock: Callable[[], float]) -> int:
    """Return how often to run something in one timing, so that it takes as long as asked. Runs it three times."""
    for _ in range(2):
        run()
    started_at = clock()
    run()
    return min(MAX_CALLS, max(1, math.ceil(least_seconds / max(clock() - started_at, 1e-9))))


def repeat(run: Callable[[], object], n_calls: int) -> None:
    for _ in range(n_calls):
        run()
