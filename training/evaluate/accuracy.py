"""Top-1 accuracy with a 95 % interval, and the time of inference alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Classifier = Callable[[Tensor], Tensor | tuple[Tensor, Tensor, Tensor]]
"""Shapes: uint8 (B, H, W, 3) -> (B, classes); if adaptive, also (B, blocks + 1) tokens, (B,) GMACs"""

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Measurement:
    """The results of a classifier on a set of images, in order.

    Shapes: is_right bool (images,); tokens (images, blocks + 1) and gmacs (images,) of an adaptive
        classifier
    """

    is_right: NDArray[np.bool_]
    inference_seconds: float
    tokens: NDArray[np.int64] | None = None
    gmacs: NDArray[np.float32] | None = None

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

    Raises: ValueError without images, or where n_right is not from 0 to n_images.
    """
    if not 0 <= n_right <= n_images or n_images == 0:
        raise ValueError(f"n_right {n_right} of n_images {n_images}: expected 0 <= n_right <= n_images, n_images > 0")
    share, z2 = n_right / n_images, Z95**2
    centre = (share + z2 / (2 * n_images)) / (1 + z2 / n_images)
    half = Z95 / (1 + z2 / n_images) * math.sqrt(share * (1 - share) / n_images + z2 / (4 * n_images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(classify: Classifier, batches: Iterable[tuple[Tensor, Tensor]], n_parallel: int = 1) -> Measurement:
    """Classify every batch once and compare with its labels.

    n_parallel: concurrent batches. On a CPU, several with one thread each are faster than one with
        several threads.
    """
    right: list[NDArray[np.bool_]] = []
    tokens: list[NDArray[np.int64]] = []
    gmacs: list[NDArray[np.float32]] = []
    seconds = 0.0
    remaining = iter(batches)
    with ThreadPoolExecutor(n_parallel) as pool:
        while group := list(islice(remaining, n_parallel)):
            start = time.perf_counter()
            answers = list(pool.map(classify, [pixels for pixels, _ in group]))
            seconds += time.perf_counter() - start
            for answer, (_, labels) in zip(answers, group, strict=True):
                logits, *costs = answer if isinstance(answer, tuple) else (answer,)
                right.append((logits.argmax(1) == labels).numpy())
                if costs:
                    tokens.append(costs[0].numpy())
                    gmacs.append(costs[1].numpy())
    if not tokens:
        return Measurement(np.concatenate(right), seconds)
    return Measurement(np.concatenate(right), seconds, np.concatenate(tokens), np.concatenate(gmacs))
