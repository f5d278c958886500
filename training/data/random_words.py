"""Random integers that are identical on every machine and with every version of NumPy.

NumPy guarantees that the raw words of a bit generator never change, but not the distributions based
on them (NEP 19). The reference task must stay bit-identical for years, so it uses only raw words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class RandomWords:
    """Random integers from the raw 64-bit words of PCG64, seeded with non-negative integers."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def integer(self, low: int, high: int) -> int:
        """Draw an integer with low <= value <= high (bias below 2**-32)."""
        return low + ((int(self._bits.random_raw()) >> 32) * (high - low + 1) >> 32)

    def chance(self, percent: int) -> bool:
        """Return True with a probability of `percent` in 100."""
        return self.integer(0, 99) < percent

    def pick(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Draw uniform bytes. Shapes: `shape`."""
        n_bytes = int(np.prod(shape))
        words = self._bits.random_raw(-(-n_bytes // 8))
        return words.astype("<u8").view(np.uint8)[:n_bytes].reshape(shape)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """Draw a permutation of 0 … n - 1: the stable order of n raw words."""
        return np.argsort(self._bits.random_raw(n), kind="stable")
