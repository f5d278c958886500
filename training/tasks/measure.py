"""Measures: how the answers on a set of images are compared with the labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Measure:
    """A measure of accuracy, from 0 to 1.

    name: in evaluations and in the manifest. label: in tables and plots.
    score: (result, labels) of a batch -> the scores of its images, (B, …). They are kept with an
        evaluation, so that two can be compared image by image.
    summarise: the scores of all images -> the measure and its 95 % interval.
    """

    name: str
    label: str
    score: Callable[[Tensor, Tensor], NDArray[Any]]
    summarise: Callable[[NDArray[Any]], tuple[float, tuple[float, float]]]


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


def _is_right(logits: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    """Compare the most probable class; of one logit, whether its probability is above 0.5."""
    answers = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    found: NDArray[np.bool_] = (answers == labels).numpy()
    return found


def _proportion(is_right: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    return float(is_right.mean()), wilson_interval(int(is_right.sum()), len(is_right))


TOP1 = Measure("top1", "top-1", _is_right, _proportion)
