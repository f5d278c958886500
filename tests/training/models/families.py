"""A small instance of each supported family: fewer blocks and patches, random weights."""

from typing import Any

import torch
from torch import nn

from training.models import load_vit

SMALL: dict[str, Any] = {"img_size": 48, "patch_size": 8, "depth": 3, "num_classes": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", SMALL),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "augreg": ("vit_tiny_patch16_224", SMALL),
    "deit3-layerscale": ("deit3_small_patch16_224", SMALL),
    "qk-norm": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}),
    "dinov2": ("vit_small_patch14_dinov2", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "swiglu": ("vit_giant_patch14_dinov2", SMALL | {"embed_dim": 48, "num_heads": 3}),
    "average": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}),
    "average-with-class-token": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "pool_include_prefix": True}),
    "average-no-class-token": ("vit_medium_patch16_gap_240", SMALL | {"embed_dim": 64, "num_heads": 4}),
    "average-registers": ("vit_little_patch16_reg4_gap_256", SMALL | {"embed_dim": 64, "num_heads": 4}),
    "clip": ("vit_xsmall_patch16_clip_224", SMALL),
    "scaled-norms": ("beit3_base_patch16_224", SMALL | {"embed_dim": 48, "num_heads": 3}),
    "aim": ("aimv2_large_patch14_224", SMALL | {"embed_dim": 48, "num_heads": 3}),
    "no-position-embedding": ("vit_tiny_patch16_224", SMALL | {"pos_embed": "none"}),
    "token-and-average": ("vit_small_patch14_reg4_dinov2", SMALL | {"global_pool": "token+avg"}),
    "dynamic-size": ("vit_tiny_patch16_224", SMALL | {"dynamic_img_size": True}),
}


def build(family: str) -> nn.Module:
    """Return the family's model in evaluation, in float64, every weight of it at work."""
    name, arguments = FAMILIES[family]
    vit = load_vit(name, **arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return vit


def images(n: int = 2, size: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
