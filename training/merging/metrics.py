"""Metrics: the vectors by which tokens are compared, one row per token, (B, N, D)."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """Return the vector by which each token is compared.

    Shapes: hidden (B, N, C), the normalised input of the attention of `block`; keys (B, heads, N,
        d) -> (B, N, D)
    """

    def __call__(self, *, block: int, hidden: Tensor, keys: Tensor) -> Tensor: ...


def key_metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Return the keys averaged over heads, after any k-norm.

    Source: arXiv 2210.09461, section 3 and table 1a: keys 84.25, features 83.70.
    """
    return keys.mean(dim=1)


def feature_metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Return the normalised features that the attention reads.

    Source: arXiv 2210.09461, table 1a, where keys do better. On the reference model features do far
        better.
    """
    return hidden


def random_metric(seed: int, width: int = 8) -> Metric:
    """Return random vectors, independent of the image: the baseline for every other metric.

    Each call draws new numbers. To repeat a run, create a new metric with the same seed.
    """
    generator = torch.Generator().manual_seed(seed)

    def metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
        n_images, n_tokens, _ = hidden.shape
        return torch.randn(n_images, n_tokens, width, generator=generator).to(hidden.device)

    return metric


METRICS: dict[str, Callable[[int], Metric]] = {
    "keys": lambda seed: key_metric,
    "features": lambda seed: feature_metric,
    "random": random_metric,
}
"""Metrics that need no training, by name; each is created from a seed."""
