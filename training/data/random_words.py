"""Random integers that are the same on every machine and with every NumPy.

NumPy promises that a bit generator's raw words never change, and promises no such thing of the distributions drawn from
them (NEP 19). The reference task must come out bit for bit the same in years, so it draws from the raw words alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class RandomWords:
    """Integers from the raw 64-bit words of PCG64, seeded with a tuple of non-negative integers."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def integer(self, low: int, high: int) -> int:
        """Draw one integer with low <= value <= high (bias below 2**-32)."""
        return low + ((int(self._bits.random_raw()) >> 32) * (high - low + 1) >> 32)

    def chance(self, percent: int) -> bool:
        """Return True in `percent` of 100 cases."""
        return self.integer(0, 99) < percent

    def pick(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Draw uniform bytes. Shapes: `shape`."""
        n_bytes = int(np.prod(shape))
        words = self._bits.random_raw(-(-n_bytes // 8))
        return words.astype("<u8").view(np.uint8)[:n_bytes].reshape(shape)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """Draw an order of 0 … n-1: the order of n raw words (ties are as good as impossible, and stable)."""
        return np.argsort(self._bits.random_raw(n), kind="stable")
