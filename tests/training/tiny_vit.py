"""A ViT small enough for fast tests, with the reference model's 197 tokens, and seeded."""

from typing import Any

import torch
from torch import nn

from training.models.vit import load_vit

ARGUMENTS: dict[str, Any] = {
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}


def tiny_vit() -> nn.Module:
    torch.manual_seed(11)
    vit = load_vit("vit_tiny_patch16_224", **ARGUMENTS)
    for parameter in vit.parameters():  # timm initialises near zero, so logits would hardly differ
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return vit.eval()
