"""Interleaved timing: runs alternate within one process, so that drift of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from scipy.stats import binom
from tqdm import tqdm

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: time of all threads of this process, more reliable than wall time on a busy machine."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of the ratio of two times of one round, with a 95 % interval of the median."""

    median: float
    ci95: tuple[float, float]


def open_session(file: Path, n_threads: int) -> Any:
    """Open a graph on this CPU. n_threads: 0 for one per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    # Spinning threads of an idle graph would slow the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def time_interleaved(
    runs: Mapping[Any, Callable[[], object]], n_rounds: int, clock: Clock = time.perf_counter, title: str = ""
) -> dict[Any, list[float]]:
    """Return seconds by run and round, after one warm-up round. The order is reversed in every second round."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for index in tqdm(range(n_rounds + 1), desc=title, unit="round"):
        for name in list(runs) if index % 2 else reversed(list(runs)):
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    return {name: measured[1:] for name, measured in seconds.items()}


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compare round by round. The interval is made of order statistics, so it assumes no distribution.

    Raises: ValueError for fewer than 6 rounds, too few for such an interval.
    """
    if len(seconds) < 6:
        raise ValueError(f"{len(seconds)} rounds: expected at least 6, for a 95 % interval of the median")
    ratios = sorted(own / other for own, other in zip(seconds, baseline, strict=True))
    n_below = int(binom.ppf(0.025, len(ratios), 0.5)) - 1
    return Ratio(statistics.median(ratios), (ratios[n_below], ratios[-1 - n_below]))
