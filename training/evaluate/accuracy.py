"""Top-1 accuracy with a 95 % interval, and the time the classifier alone took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Classifier = Callable[[Tensor], Tensor]
"""Shapes: uint8 (B, H, W, 3) -> logits (B, classes)"""

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Measurement:
    """What a classifier did on a set, image by image in its order. Shapes: is_right bool (images,)"""

    is_right: NDArray[np.bool_]
    inference_seconds: float

    @property
    def top1(self) -> float:
        return float(self.is_right.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson_interval(int(self.is_right.sum()), len(self.is_right))

    @property
    def images_per_second(self) -> float:
        return len(self.is_right) / self.inference_seconds


def wilson_interval(n_right: int, n_images: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927).

    Raises: ValueError without images, or with more right than there are.
    """
    if not 0 <= n_right <= n_images or n_images == 0:
        raise ValueError(f"n_right {n_right} of n_images {n_images}: expected 0 <= n_right <= n_images, n_images > 0")
    share, z2 = n_right / n_images, _Z95**2
    centre = (share + z2 / (2 * n_images)) / (1 + z2 / n_images)
    half = _Z95 / (1 + z2 / n_images) * math.sqrt(share * (1 - share) / n_images + z2 / (4 * n_images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(classify: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> Measurement:
    """Classify every batch once and compare with its labels."""
    right: list[NDArray[np.bool_]] = []
    seconds = 0.0
    for pixels, labels in batches:
        start = time.perf_counter()
        logits = classify(pixels)
        seconds += time.perf_counter() - start
        right.append((logits.argmax(1) == labels).numpy())
    return Measurement(np.concatenate(right), seconds)
