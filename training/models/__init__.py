"""Vision transformers that merge tokens, based on timm's. Only `vit` imports timm."""

from training.models.macs import count_macs, matching_macs, vit_macs
from training.models.vit import (
    MergedFeatures,
    MergingVisionTransformer,
    UnsupportedArchitecture,
    WeightsMismatch,
    load_vit,
)

__all__ = [
    "MergedFeatures",
    "MergingVisionTransformer",
    "UnsupportedArchitecture",
    "WeightsMismatch",
    "count_macs",
    "load_vit",
    "matching_macs",
    "vit_macs",
]
