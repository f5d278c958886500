"""Memory of activations: how many images run at once, whatever the size of the model."""

from __future__ import annotations

from typing import Any

from torch import nn

BUDGET_BYTES = 1 << 30
"""Of activations, of all batches that run at the same time."""
MAX_BATCH = 64


def n_tokens(vit: nn.Module) -> int:
    """Return the number of tokens before the first block."""
    model: Any = vit
    return int(model.patch_embed.num_patches + model.num_prefix_tokens)


def activation_bytes(vit: nn.Module) -> int:
    """Estimate the memory of one image in float32: its largest block, and the scores of all blocks."""
    model: Any = vit
    n, width = n_tokens(vit), int(model.embed_dim)
    # Logits of attention, their softmax, and a copy.
    of_attention = 3 * int(model.blocks[0].attn.num_heads) * n**2
    # Norm, queries, keys, values, the MLP before and after its activation, and sums.
    of_block = 20 * n * width
    # Each half of the tokens with the other, twice: eager's and the graph's.
    of_scores = len(model.blocks) * n**2 // 2
    return 4 * (of_attention + of_block + of_scores)


def images_at_once(vit: nn.Module, n_images: int = MAX_BATCH, n_parallel: int = 1) -> int:
    """Return the size of a batch that fits into the budget n_parallel times; at least 1, at most n_images."""
    return max(1, min(MAX_BATCH, n_images, BUDGET_BYTES // (n_parallel * activation_bytes(vit))))
