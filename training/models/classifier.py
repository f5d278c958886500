"""Classifiers to export: uint8 pixels in, logits out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.data.pixel_rule import stated_rule
from training.data.preprocessing import InputRule
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.calibration import Calibration
from training.models.embedding import DecoupledEmbedding
from training.models.frozen import FrozenModule
from training.models.vit import MergingVisionTransformer, MetricChoice

CLASSIFY = "classify"
SOFTMAX, SIGMOID = ACTIVATIONS = ("softmax", "sigmoid")
"""From logits to probabilities: over all labels, or of each label alone."""


def check_activation(activation: str, n_outputs: int) -> None:
    """Raises: ValueError for an unknown activation, or a softmax over one output, which is always 1."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected {' or '.join(ACTIVATIONS)}")
    if activation == SOFTMAX and n_outputs == 1:
        raise ValueError("the model has 1 output, and a softmax over it is always 1: expected activation sigmoid")


class ServedClassifier(FrozenModule):
    """A classifier with a fixed number of tokens."""

    task, is_adaptive = CLASSIFY, False

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, classes)"""
        logits: Tensor = self.model(self.normalised(pixels))
        return logits.float()


class AdaptiveClassifier(FrozenModule):
    """A classifier whose tokens depend on the image; it also returns each image's tokens and GMACs."""

    task, is_adaptive = CLASSIFY, True
    model: AdaptiveVisionTransformer

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, the tokens before each block and at the end, and GMACs.

        Shapes: uint8 (B, H, W, 3) -> float32 (B, classes), int64 (B, blocks + 1), float32 (B,)
        """
        logits, tokens = self.model.forward_counted(self.normalised(pixels))
        # Divide in float64: float32 rounds MACs above 2**24.
        gmacs = self.model.macs(tokens).double() / 1e9
        return logits.float(), tokens, gmacs.float()


def input_rule(vit: nn.Module) -> InputRule:
    """Return the preprocessing that timm states for a model's weights, at the model's own size.

    Raises: ValueError where it is none that the service has.
    """
    model: Any = vit
    height, width = model.patch_embed.img_size
    return stated_rule(getattr(model, "pretrained_cfg", None) or {}, height=height, width=width)


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


def adaptive_classifier(
    vit: nn.Module, rule: InputRule, calibration: Calibration, embedding: DecoupledEmbedding | None
) -> AdaptiveClassifier:
    """Return a ViT with calibrated thresholds, for evaluation or export. Raises: CalibrationMismatch"""
    return AdaptiveClassifier(calibration.model(vit, embedding), rule).eval()
