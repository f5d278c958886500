"""Multiply-accumulates (MACs) of a vision transformer that merges tokens: by formula, and counted as it runs.

Published figures call these "FLOPs" and leave out what deciding and applying a merge costs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.merging import tokens_per_block
from training.merging.matching import first_free


def vit_macs(vit: nn.Module, schedule: Sequence[int]) -> int:
    """Return the MACs for one image under a resolved schedule, merging itself left out: the published convention."""
    return int(macs_of_tokens(vit, tokens_per_block(schedule, _n_tokens(vit))))


def macs_of_tokens(vit: nn.Module, tokens: Sequence[Any]) -> Any:
    """Return the MACs where so many tokens enter each block and, last, are left: integers, or int64 tensors of images.

    Every block's attention runs on the tokens that enter it, its MLP on those that are left: with N and N' of them,
    width C and attention width A, N·C·3A + 2·N²·A + N·A·C and N' times the MLP's weights.
    """
    model: Any = vit
    macs = int(model.patch_embed.num_patches) * _weights(model.patch_embed)
    for block, n_before, n_after in zip(model.blocks, tokens[:-1], tokens[1:], strict=True):
        macs = macs + n_before * _weights(block.attn) + 2 * n_before**2 * int(block.attn.attn_dim)
        macs = macs + n_after * _weights(block.mlp)
    return macs + sum(_weights(head) for head in (model.head, getattr(model, "head_dist", None)) if head is not None)


def matching_macs(vit: nn.Module, schedule: Sequence[int], *, embedding_dim: int | None = None) -> int:
    """Return the MACs that matching and merging add: |A|·|B|·D for the scores, N'·r·C for the merge.

    D is the width of the keys; embedding_dim: of a decoupled embedding in their place, which costs N·C·D itself.
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
    """Count the MACs that one image costs, from the operators that really run: merging included.

    Every matmul, convolution and attention; not the additions, norms, sorts and copies between them.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        model.train(was_training)
    return int(counter.get_total_flops()) // 2


def _n_tokens(vit: Any) -> int:
    return int(vit.patch_embed.num_patches) + int(vit.num_prefix_tokens)


def _weights(module: nn.Module) -> int:
    """Return the weights of the layers that multiply: MACs per token, since each meets a token once."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    weights: list[Tensor] = [layer.weight for layer in layers]
    return sum(weight.numel() for weight in weights)
