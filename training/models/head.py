"""DINOv2's classifier, which timm does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKEN_AND_AVERAGE = "token+avg"
"""The `global_pool` of `load_vit` that selects `TokenAndAverage`."""


class TokenAndAverage(nn.Linear):
    """A linear classifier of the class token joined with the average of the patches.

    It takes the place of the head of a timm model that does not pool. Merged patches count with
    their size, as in models that average.
    Source: arXiv 2304.07193, linear evaluation on ImageNet.
    """

    def __init__(self, vit: nn.Module) -> None:
        model: Any = vit
        device = next(vit.parameters()).device
        super().__init__(2 * int(model.embed_dim), int(model.num_classes), device=device)
        self.n_prefix = int(model.num_prefix_tokens)

    def forward(self, tokens: Tensor, size: Tensor | None = None) -> Tensor:
        """Shapes: (B, N, C), (B, N, 1) -> (B, classes)"""
        patches = tokens[:, self.n_prefix :]
        average = patches.mean(dim=1) if size is None else weighted_average(patches, size[:, self.n_prefix :])
        return super().forward(torch.cat([tokens[:, 0], average], dim=-1))


def weighted_average(tokens: Tensor, size: Tensor) -> Tensor:
    """Return the average of tokens by size. Shapes: (B, N, C), (B, N, 1) -> (B, C)"""
    weight = (size / size.sum(dim=1, keepdim=True)).to(tokens.dtype)
    return (tokens * weight).sum(dim=1)
