"""Proportional attention: a token of m patches receives the attention of m equal tokens."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

AttentionForm: TypeAlias = Literal["masked", "plain", "augmented_keys", "augmented_values", "plain_augmented_values"]
"""Equivalent computations of softmax(qkᵀ/√d + log m)v.

masked: a fused kernel with the bias as a mask, which excludes some kernels. plain: matmul, softmax,
    matmul, the fewest nodes in an exported graph. augmented_keys: [q, 1]·[k, log m].
    augmented_values: attend over [m·v, m] and divide by the last column. These two need no mask, at
    the cost of a wider head. plain_augmented_values: the latter without a fused kernel. With
    augmented values, sizes of 0 are safe, also in the gradient.
"""


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    form: AttentionForm = "masked",
    dropout_p: float = 0.0,
) -> Tensor:
    """Return softmax(q·kᵀ/√d + log m)·v, with log m along the key axis; plain without sizes.

    Shapes: q, k, v (B, heads, N, d), size (B, N, 1) or None where every token is one patch -> (B,
        heads, N, d)
    Source: arXiv 2210.09461, equation 1.
    """
    if form not in get_args(AttentionForm):
        raise ValueError(f"form must be one of {', '.join(get_args(AttentionForm))}, not {form!r}")
    if form == "plain" or (form == "plain_augmented_values" and size is None):
        return _plain(q, k, v, size, dropout_p)
    if form == "plain_augmented_values" and size is not None:
        return _augmented_values(q, k, v, size, dropout_p, attend=_plain)
    if size is None:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    if form == "augmented_keys":
        return _augmented_keys(q, k, v, size, dropout_p)
    if form == "augmented_values":
        return _augmented_values(q, k, v, size, dropout_p)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=_log_size(size, q), dropout_p=dropout_p)


def _log_size(size: Tensor, like: Tensor) -> Tensor:
    """Shapes: (B, N, 1) -> (B, 1, 1, N)"""
    return size.log().reshape(-1, 1, 1, size.shape[1]).to(like.dtype)


def _plain(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if size is not None:
        logits = logits + _log_size(size, q)
    weights = logits.softmax(dim=-1)
    if dropout_p:
        weights = functional.dropout(weights, dropout_p)
    return weights @ v


def _augmented_keys(q: Tensor, k: Tensor, v: Tensor, size: Tensor, dropout_p: float) -> Tensor:
    scale = q.shape[-1] ** -0.5
    # Fused GPU kernels need a multiple of 8.
    padding = (0, -(q.shape[-1] + 1) % 8)
    bias = (_log_size(size, q).transpose(-2, -1) / scale).expand(*k.shape[:-1], 1)
    q = functional.pad(torch.cat([q, torch.ones_like(bias)], dim=-1), padding)
    k = functional.pad(torch.cat([k, bias], dim=-1), padding)
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def _augmented_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor,
    dropout_p: float,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = functional.scaled_dot_product_attention,
) -> Tensor:
    if dropout_p:
        raise ValueError(
            "augmented_values has no attention dropout: it would drop the same terms from numerator and normaliser"
        )
    size = size.unsqueeze(1).to(v.dtype)  # (B, 1, N, 1)
    v = torch.cat([v * size, size.expand(*v.shape[:-1], 1)], dim=-1)
    mixed = attend(q, k, v)
    return mixed[..., :-1] / mixed[..., -1:]
