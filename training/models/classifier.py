"""What is frozen: uint8 pixels in, logits out, everything between them in the graph."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.models.adaptive import AdaptiveVisionTransformer
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
        logits: Tensor = self.model(self.normalised(pixels))
        return logits.float()

    def normalised(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)"""
        channels: Tensor = pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset
        return channels


class AdaptiveClassifier(nn.Module):
    """An adaptive model behind the same input; it says what each image kept and cost, besides what it shows."""

    def __init__(self, model: AdaptiveVisionTransformer, rule: InputRule) -> None:
        super().__init__()
        self.served = ServedClassifier(model, rule)

    @property
    def model(self) -> AdaptiveVisionTransformer:
        model: Any = self.served.model
        return model  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, tokens that enter each block and are left at the end, GMACs; see `AdaptiveVisionTransformer`.

        Shapes: uint8 (B, H, W, 3) -> float32 (B, classes), int64 (B, blocks + 1), float32 (B,)
        """
        logits, tokens = self.model.forward_counted(self.served.normalised(pixels))
        gmacs = self.model.macs(tokens).double() / 1e9  # past 2**24 float32 would round the MACs themselves
        return logits.float(), tokens, gmacs.float()


FrozenClassifier: TypeAlias = ServedClassifier | AdaptiveClassifier


def input_rule(vit: nn.Module) -> InputRule:
    """Take over what timm states of a model's weights: size, mean, standard deviation, interpolation and crop."""
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
    """Wrap a ViT at a constant rate for evaluation or export.

    Late blocks that run out of tokens remove what they can, as the published figures do; `model.schedule` tells.
    Attention is put plainly (matmul, softmax, matmul): the fewest nodes in a graph. Of the other exact forms, the two
    augmented ones were 1-2 % slower as graphs in one trial on a CPU; the masked one was not timed.
    A decoupled embedding as metric is computed in the GEMM of the qkv layers.
    Raises: ValueError where already the first block cannot remove r.
    """
    model = MergingVisionTransformer(
        vit, r, exhausted="reduce", metric=metric, metric_seed=metric_seed, attention="plain", join=r > 0
    )
    if model.schedule[0] != r:
        raise ValueError(f"the first block cannot remove r={r} of {model.tokens[0]} tokens, only {model.schedule[0]}")
    return ServedClassifier(model, rule).eval()
