"""Summaries of repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over rounds."""

    median: float
    min: float
    max: float

    def text(self, digits: int = 1, unit: str = "") -> str:
        median, low, high = (f"{value:.{digits}f}" for value in (self.median, self.min, self.max))
        return f"{median}{unit} ({low} … {high})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def error_bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return distances below and above the medians, as Matplotlib takes them."""
    return [[one.median - one.min for one in spreads], [one.max - one.median for one in spreads]]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile by linear interpolation, or None without values."""
    return float(np.percentile(values, percent)) if len(values) else None
