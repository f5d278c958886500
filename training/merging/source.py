"""Source maps: which original tokens each token contains, as 0 or 1, (B, N_out, N_in).

A matching updates it like sizes, with `source = matching.merge_sum(source)`, since groups never
overlap.
"""

import torch
from torch import Tensor


def identity_source(tokens: Tensor) -> Tensor:
    """Return the source map of unmerged tokens. Shapes: (B, N, C) -> float32 (B, N, N)"""
    n_images, n_tokens = tokens.shape[:2]
    return torch.eye(n_tokens, device=tokens.device).expand(n_images, -1, -1)


def unmerge(tokens: Tensor, source: Tensor) -> Tensor:
    """Copy each token to the positions of the original tokens that it contains.

    Shapes: tokens (B, N_out, C), source (B, N_out, N_in) -> (B, N_in, C)
    """
    if tokens.shape[:2] != source.shape[:2]:
        raise ValueError(f"tokens {tuple(tokens.shape)} and source {tuple(source.shape)} differ in images or tokens")
    owner = source.argmax(dim=1).unsqueeze(-1)  # (B, N_in, 1)
    # torch.export would fix the batch size of take_along_dim.
    return tokens.gather(1, owner.expand(-1, -1, tokens.shape[-1]))
