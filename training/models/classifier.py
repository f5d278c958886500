"""Modules to export: uint8 pixels in, logits out, with normalisation and model in one graph."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.tasks import CLASSIFY
from training.models.vit import MergingVisionTransformer, MetricChoice


class ServedClassifier(nn.Module):
    """A merging ViT with the service's input: scaling and normalisation are part of it."""

    task, is_adaptive = CLASSIFY, False

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
        logits: Tensor = self.model(self.normalised(pixels))
        return logits.float()

    def normalised(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)"""
        channels: Tensor = pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset
        return channels


class AdaptiveClassifier(nn.Module):
    """An adaptive ViT with the same input, which also returns tokens and GMACs of each image."""

    task, is_adaptive = CLASSIFY, True

    def __init__(self, model: AdaptiveVisionTransformer, rule: InputRule) -> None:
        super().__init__()
        self.served = ServedClassifier(model, rule)

    @property
    def model(self) -> AdaptiveVisionTransformer:
        model: Any = self.served.model
        return model  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, the tokens before each block and at the end, and GMACs.

        Shapes: uint8 (B, H, W, 3) -> float32 (B, classes), int64 (B, blocks + 1), float32 (B,)
        """
        logits, tokens = self.model.forward_counted(self.served.normalised(pixels))
        # Divide in float64: float32 rounds MACs above 2**24.
        gmacs = self.model.macs(tokens).double() / 1e9
        return logits.float(), tokens, gmacs.float()


FrozenClassifier: TypeAlias = ServedClassifier | AdaptiveClassifier


def input_rule(vit: nn.Module) -> InputRule:
    """Return the preprocessing that timm states for a model's weights."""
    model: Any = vit
    stated = model.pretrained_cfg
    height, width = model.patch_embed.img_size
    return InputRule(
        height=height,
        width=width,
        resize_shorter_side=int(max(height, width) / stated["crop_pct"]),
        interpolation=stated["interpolation"],
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
    )


def frozen_classifier(
    vit: nn.Module, rule: InputRule, r: int, *, metric: MetricChoice = "keys", metric_seed: int = 0
) -> ServedClassifier:
    """Return a ViT at a constant rate, for evaluation or export.

    Late blocks with too few tokens remove as many as they can, as in the published figures; see
    `model.schedule`. Attention is plain (matmul, softmax, matmul), which gives the fewest nodes in
    a graph. In one trial on a CPU, graphs with the two augmented forms were 1-2 % slower; the
    masked form was not timed. An embedding as the metric is computed in the GEMM of the qkv layers.
    Raises: ValueError where the first block cannot remove r tokens.
    """
    model = MergingVisionTransformer(
        vit, r, exhausted="reduce", metric=metric, metric_seed=metric_seed, attention="plain", join=r > 0
    )
    if model.schedule[0] != r:
        raise ValueError(f"the first block cannot remove r={r} of {model.tokens[0]} tokens, only {model.schedule[0]}")
    return ServedClassifier(model, rule).eval()
