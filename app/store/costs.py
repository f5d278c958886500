"""Costs: run time on this host by variant and batch size, measured at start-up and updated by every run."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

# Per image, for a variant that was never measured.
DEFAULT_SECONDS = 0.05
SMOOTHING = 0.1
# A run counts as at most this many times its expected duration, so that outliers do not distort the estimate.
MAX_OUTLIER_RATIO = 4.0


def batch_buckets(max_batch_images: int) -> list[int]:
    """List the batch sizes of cost tables and of padded batches: powers of two, and the maximum."""
    powers = [1 << k for k in range(max_batch_images.bit_length()) if 1 << k < max_batch_images]
    return [*powers, max_batch_images]


class CostTable:
    """Run time of one variant at a few batch sizes: linear between them, proportional above. Units: seconds."""

    def __init__(self, seconds_by_size: Mapping[int, float] | None = None) -> None:
        table = seconds_by_size or {1: DEFAULT_SECONDS}
        self._sizes = sorted(table)
        self._seconds = [table[size] for size in self._sizes]

    def seconds(self, n_images: int) -> float:
        return sum(weight * self._seconds[i] for i, weight in self._weights(n_images))

    def learn(self, n_images: int, seconds: float) -> None:
        """Move the entries of the nearest sizes towards the duration of a run."""
        error = seconds - self.seconds(n_images)
        weights = self._weights(n_images)
        norm = sum(weight * weight for _, weight in weights)
        for i, weight in weights:
            minimum = self._seconds[i] / MAX_OUTLIER_RATIO
            self._seconds[i] = max(minimum, self._seconds[i] + SMOOTHING * error * weight / norm)

    def by_size(self, sizes: Sequence[int]) -> dict[int, float]:
        return {size: self.seconds(size) for size in sizes}

    def _weights(self, n_images: int) -> list[tuple[int, float]]:
        """Return the entries that an estimate combines, and the weight of each."""
        right = bisect_left(self._sizes, n_images)
        if right == len(self._sizes):
            return [(right - 1, n_images / self._sizes[-1])]
        if right == 0:
            return [(0, 1.0)]
        low, high = self._sizes[right - 1], self._sizes[right]
        share = (n_images - low) / (high - low)
        return [(right - 1, 1 - share), (right, share)]


class Pace:
    """Current slowdown of the host against its cost tables. One factor for all variants: a busy host slows them all."""

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, seconds: float, table_seconds: float) -> None:
        ratio = min(seconds / table_seconds, MAX_OUTLIER_RATIO * self.factor)
        self.factor += SMOOTHING * (ratio - self.factor)
