"""Timing in turns: what is compared runs alternately within one process, so that a machine's drift meets all of it."""

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
"""cpu: time of this process on all its threads, the first thing to trust on a machine that has other work."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of two times of the same round, with a 95 % interval of the median."""

    median: float
    ci95: tuple[float, float]


def open_session(file: Path, n_threads: int) -> Any:
    """Open a graph on this CPU; n_threads 0: as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle graphs must not slow the others
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def time_in_turns(
    runs: Mapping[Any, Callable[[], object]], n_rounds: int, clock: Clock = time.perf_counter, title: str = ""
) -> dict[Any, list[float]]:
    """Return seconds by run and round, after one round to warm up. The order is turned round from round to round."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for index in tqdm(range(n_rounds + 1), desc=title, unit="round"):
        for name in list(runs) if index % 2 else reversed(list(runs)):
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    return {name: measured[1:] for name, measured in seconds.items()}


def paired_ratio(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    """Compare round by round; the interval is made of order statistics, whatever the distribution.

    Raises: ValueError for fewer than 6 rounds, of which no such interval can be made.
    """
    if len(seconds) < 6:
        raise ValueError(f"{len(seconds)} rounds: a 95 % interval of a median needs at least 6")
    ratios = sorted(own / other for own, other in zip(seconds, base, strict=True))
    n_below = int(binom.ppf(0.025, len(ratios), 0.5)) - 1
    return Ratio(statistics.median(ratios), (ratios[n_below], ratios[-1 - n_below]))
