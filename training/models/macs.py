"""Multiply-accumulates (MACs) of a merging ViT, by formula and by counting operators.

Published figures call them "FLOPs", and exclude the cost of matching and merging.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.merging import tokens_per_block
from training.merging.matching import first_free


def vit_macs(vit: nn.Module, schedule: Sequence[int]) -> int:
    """Return the MACs of one image without matching and merging, as published."""
    return int(macs_of_tokens(vit, tokens_per_block(schedule, _n_tokens(vit))))


def macs_of_tokens(vit: nn.Module, tokens: Sequence[Any]) -> Any:
    """Return the MACs for token counts before each block and at the end, integers or tensors.

    With N tokens before a block, N' after it, width C and attention width A: attention costs
    N·C·3A + 2·N²·A + N·A·C, and the MLP costs N' times its weights.
    """
    model: Any = vit
    macs = int(model.patch_embed.num_patches) * _weights(model.patch_embed)
    for block, n_before, n_after in zip(model.blocks, tokens[:-1], tokens[1:], strict=True):
        macs = macs + n_before * _weights(block.attn) + 2 * n_before**2 * int(block.attn.attn_dim)
        macs = macs + n_after * _weights(block.mlp)
    return macs + sum(_weights(head) for head in (model.head, getattr(model, "head_dist", None)) if head is not None)


def matching_macs(vit: nn.Module, schedule: Sequence[int], *, embedding_dim: int | None = None) -> int:
    """Return the MACs of matching and merging: |A|·|B|·D for the scores and N'·r·C for the merge.

    D is the width of the keys, or embedding_dim for a decoupled embedding, which costs another
    N·C·D.
    """
    model: Any = vit
    width = int(model.embed_dim)
    n_protected = int(model.num_prefix_tokens)
    macs = 0
    for block, n_tokens, r in zip(model.blocks, tokens_per_block(schedule, _n_tokens(vit)), schedule, strict=False):
        n_a, n_b = (len(range(first, n_tokens, 2)) for first in first_free(n_protected))
        if r:
            macs += n_a * n_b * (embedding_dim or int(block.attn.head_dim)) + (n_tokens - r) * r * width
            macs += n_tokens * width * (embedding_dim or 0)
    return macs


def count_macs(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Count the MACs of one image, as `count_macs_of`."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameter = next(model.parameters())
    return count_macs_of(model, torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))


def count_macs_of(model: nn.Module, example: Tensor) -> int:
    """Count the MACs of an input from the operators that run, merging included.

    Counted are matmuls, convolutions and attention, not additions, norms, sorts and copies.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
    finally:
        model.train(was_training)
    return int(counter.get_total_flops()) // 2


def _n_tokens(vit: Any) -> int:
    return int(vit.patch_embed.num_patches) + int(vit.num_prefix_tokens)


def _weights(module: nn.Module) -> int:
    """Return the number of weights of linear and convolution layers, which is their MACs per token."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    weights: list[Tensor] = [layer.weight for layer in layers]
    return sum(weight.numel() for weight in weights)
