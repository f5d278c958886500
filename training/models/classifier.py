"""What is frozen: uint8 pixels in, logits out, everything between them in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.merging import Schedule
from training.models.vit import MergingVisionTransformer, MetricChoice


class ServedClassifier(nn.Module):
    """A merging vision transformer behind the service's input: scaling and normalisation are part of it."""

    def __init__(self, model: MergingVisionTransformer, rule: InputRule) -> None:
        super().__init__()
        self.model = model
        self.scale: Tensor
        self.offset: Tensor
        mean, std = torch.tensor(rule.mean), torch.tensor(rule.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, classes)"""
        channels: Any = pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset
        logits: Tensor = self.model(channels)
        return logits.float()


def frozen_classifier(
    vit: nn.Module, rule: InputRule, schedule: Schedule, *, metric: MetricChoice = "keys", metric_seed: int = 0
) -> ServedClassifier:
    """Wrap a ViT at a rate for evaluation or export. The last blocks give what they can; the schedule says how much.

    Attention is put plainly (matmul, softmax, matmul): the fewest nodes in a graph, and the fastest on CPUs that was
    measured; the fused forms are exact equals of it.
    """
    model = MergingVisionTransformer(
        vit, schedule, exhausted="reduce", metric=metric, metric_seed=metric_seed, attention="plain"
    )
    return ServedClassifier(model, rule).eval()
