"""How patches of the digit and of the background are grouped into tokens, on the reference task.

`training.data.digits.digit_patches` defines the digit's patches. All others are background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_N_SAMPLES, _BOOTSTRAP_SEED = 1000, 1979

FIGURES = {
    "digit_alone": "share of the digit's patches that are a token by themselves",
    "background_alone": "share of the background's patches that are a token by themselves",
    "digit_group": "mean number of patches in the token of a digit's patch",
    "background_group": "mean number of patches in the token of a background patch",
    "purity": "share of the tokens with digit patches that have no background patch",
}


def patch_figures(source: NDArray[np.bool_], is_digit: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Return each of `FIGURES` for each image.

    Shapes: source (B, tokens, patches), the patches of each token, without protected tokens;
        is_digit (B, patches) -> (B,) each
    Raises: ValueError where a patch is not in exactly one token, or an image lacks digit or
        background patches.
    """
    if not (source.sum(1) == 1).all():
        raise ValueError("every patch must be in exactly one token: does the source map include protected tokens?")
    if not (is_digit.any(1) & ~is_digit.all(1)).all():
        raise ValueError("every image must have patches of the digit and of the background")
    group = (source * source.sum(2, keepdims=True)).sum(1)  # (B, patches), the size of the token of each
    has_digit = (source & is_digit[:, None]).any(2)
    has_background = (source & ~is_digit[:, None]).any(2)
    return {
        "digit_alone": _mean(group == 1, is_digit),
        "background_alone": _mean(group == 1, ~is_digit),
        "digit_group": _mean(group, is_digit),
        "background_group": _mean(group, ~is_digit),
        "purity": _mean(~has_background, has_digit),
    }


def _mean(values: Any, where: Any) -> NDArray[np.float64]:
    """Shapes: (B, N), (B, N) -> (B,)"""
    mean: NDArray[np.float64] = np.mean(values.astype(np.float64), axis=1, where=where)
    return mean


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Return the mean over images, with the percentile interval of 1000 seeded bootstrap samples.

    Shapes: (images,)
    Raises: ValueError for fewer than two images.
    Source: B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7
        (1979), 1-26.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} images: an interval needs two or more")
    low, high = np.percentile(_bootstrap_counts(len(values)) @ values / len(values), [2.5, 97.5])
    return Estimate(float(values.mean()), (float(low), float(high)))


@cache
def _bootstrap_counts(n_images: int) -> NDArray[np.float64]:
    """Draw the number of times that each image is in each sample. Shapes: (samples, images)"""
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    return generator.multinomial(n_images, np.full(n_images, 1 / n_images), _N_SAMPLES).astype(np.float64)


@dataclass(frozen=True)
class BackgroundRow:
    """One policy at one rate. With a base, the paired difference from it. figures: see `FIGURES`"""

    policy: str
    r: int
    figures: dict[str, Estimate]
    base: str | None = None


Measured = dict[tuple[str, int], list[dict[str, NDArray[np.float64]]]]
"""(policy, r) -> results of `patch_figures`, batch by batch, on the same images for all"""


def summarise(measured: Measured, base: str) -> list[BackgroundRow]:
    """Return rows per policy and rate, and rows of differences from the base policy."""
    whole = {key: _joined(batches) for key, batches in measured.items()}
    rows = [BackgroundRow(policy, r, _estimates(figures)) for (policy, r), figures in whole.items()]
    for (policy, r), figures in whole.items():
        if policy != base:
            differences = {name: values - whole[base, r][name] for name, values in figures.items()}
            rows.append(BackgroundRow(policy, r, _estimates(differences), base))
    return rows


def _joined(batches: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in FIGURES}


def _estimates(figures: dict[str, NDArray[np.float64]]) -> dict[str, Estimate]:
    return {name: estimate(values) for name, values in figures.items()}
