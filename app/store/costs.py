"""Costs: how long a run takes on this host, by variant and batch size. Measured at start-up, corrected by every run."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

FIRST_GUESS_SECONDS = 0.05  # per image, of a variant that was never measured
SMOOTHING = 0.1
MAX_SURPRISE = 4.0  # one run that took longer than this many times what was expected says no more than that


def batch_buckets(max_batch_images: int) -> list[int]:
    """List the batch sizes that are measured, and on some devices run: 1, 2, 4 … and the largest."""
    powers = [1 << k for k in range(max_batch_images.bit_length()) if 1 << k < max_batch_images]
    return [*powers, max_batch_images]


class CostTable:
    """Seconds of one variant's runs at some batch sizes; linear between them, proportional beyond."""

    def __init__(self, seconds_by_size: Mapping[int, float] | None = None) -> None:
        table = seconds_by_size or {1: FIRST_GUESS_SECONDS}
        self._sizes = sorted(table)
        self._seconds = [table[size] for size in self._sizes]

    def seconds(self, n_images: int) -> float:
        return sum(weight * self._seconds[i] for i, weight in self._weights(n_images))

    def learn(self, n_images: int, seconds: float) -> None:
        """Move the nearest sizes towards what a run has taken."""
        error = seconds - self.seconds(n_images)
        weights = self._weights(n_images)
        norm = sum(weight * weight for _, weight in weights)
        for i, weight in weights:
            least = self._seconds[i] / MAX_SURPRISE
            self._seconds[i] = max(least, self._seconds[i] + SMOOTHING * error * weight / norm)

    def by_size(self, sizes: Sequence[int]) -> dict[int, float]:
        return {size: self.seconds(size) for size in sizes}

    def _weights(self, n_images: int) -> list[tuple[int, float]]:
        """Say which sizes an estimate is made of, and how much of each."""
        right = bisect_left(self._sizes, n_images)
        if right == len(self._sizes):
            return [(right - 1, n_images / self._sizes[-1])]
        if right == 0:
            return [(0, 1.0)]
        low, high = self._sizes[right - 1], self._sizes[right]
        share = (n_images - low) / (high - low)
        return [(right - 1, 1 - share), (right, share)]


class Pace:
    """How much slower the host is now than its tables say: what slows one variant slows those that do not run too."""

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, seconds: float, table_seconds: float) -> None:
        ratio = min(seconds / table_seconds, MAX_SURPRISE * self.factor)
        self.factor += SMOOTHING * (ratio - self.factor)
