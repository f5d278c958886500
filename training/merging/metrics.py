"""A metric is what tokens are compared by: one row of numbers per token, (B, N, D)."""

from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """Give each token the row by which it is compared.

    Shapes: hidden (B, N, C), what the attention of `block` reads (normalised); keys (B, heads, N, d); result (B, N, D).
    """

    def __call__(self, *, block: int, hidden: Tensor, keys: Tensor) -> Tensor: ...


def key_metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Return the mean over heads of the keys, as the attention compares them (after any k-norm).

    Source: arXiv 2210.09461, section 3 and table 1a: keys 84.25, features 83.70.
    """
    return keys.mean(dim=1)


def feature_metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Return what the attention reads: the tokens' own features, normalised.

    Source: arXiv 2210.09461, table 1a, where keys were better; on the reference model features are, by far.
    """
    return hidden


def random_metric(seed: int, width: int = 8) -> Metric:
    """Return a metric that knows nothing of the image: the baseline that any other must beat.

    Successive calls draw on, so the metric, not the model, is what has to be made anew to repeat a run.
    """
    generator = torch.Generator().manual_seed(seed)

    def metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
        n_images, n_tokens, _ = hidden.shape
        return torch.randn(n_images, n_tokens, width, generator=generator).to(hidden.device)

    return metric
