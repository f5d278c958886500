"""Paired comparison of two classifiers on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from training.tasks.measure import Z95


@dataclass(frozen=True)
class PairedCounts:
    """Counts of images that both, one or neither of two classifiers get right."""

    n_both: int
    n_only_base: int
    n_only_other: int
    n_neither: int

    def __post_init__(self) -> None:
        counts = (self.n_both, self.n_only_base, self.n_only_other, self.n_neither)
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"counts {counts}: expected none below 0, and at least one image")

    @property
    def n_images(self) -> int:
        return self.n_both + self.n_only_base + self.n_only_other + self.n_neither

    @property
    def difference(self) -> float:
        """The other's accuracy minus the base's."""
        return (self.n_only_other - self.n_only_base) / self.n_images

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wald interval of the difference, with half an image added to each count.

        Source: A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched
            proportions, Statistics in Medicine 24 (2005), 729-740.
        """
        n_images = self.n_images + 2
        only_base, only_other = self.n_only_base + 0.5, self.n_only_other + 0.5
        centre = (only_other - only_base) / n_images
        half = Z95 * math.sqrt((only_base + only_other) / n_images - centre**2) / math.sqrt(n_images)
        return max(-1.0, centre - half), min(1.0, centre + half)

    def mcnemar(self) -> float:
        """Return the exact two-sided p-value of McNemar's test.

        Source: Q. McNemar, Psychometrika 12 (1947), 153-157, with the binomial distribution.
        """
        n_discordant = self.n_only_base + self.n_only_other
        return float(binomtest(self.n_only_other, n_discordant).pvalue) if n_discordant else 1.0


def count_pairs(base: NDArray[np.bool_], other: NDArray[np.bool_]) -> PairedCounts:
    """Count the 2x2 table. Shapes: bool (images,) each, the same images in the same order.

    Raises: ValueError where the numbers of images differ or are 0.
    """
    if base.shape != other.shape or base.ndim != 1:
        raise ValueError(f"is_right of {base.shape} and of {other.shape}: expected the same images")
    n_base, n_other, n_both = int(base.sum()), int(other.sum()), int((base & other).sum())
    return PairedCounts(n_both, n_base - n_both, n_other - n_both, len(base) - n_base - n_other + n_both)
