"""Matchings: which tokens merge into which. Deciding a matching is separate from applying it.

A matching is decided once, from a metric. It applies to any tensor with one row per token:
features, sizes, source map.
Source: arXiv 2210.09461, section 3, bipartite soft matching.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from training.merging.schedule import max_r


class Matching(Protocol):
    """A decided matching. Each group of rows that merge becomes one row."""

    def merge_sum(self, x: Tensor) -> Tensor:
        """Sum the rows of each group. Shapes: (B, N, C) -> (B, N - r, C)"""
        ...

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Average the rows of each group, weighted by size, and sum the sizes.

        Shapes: x (B, N, C), size (B, N, 1) or None for all ones -> (B, N - r, C), (B, N - r, 1);
            size stays None only where nothing merges.
        """
        ...


class _Identity:
    """Merges nothing: r = 0 without a branch."""

    def merge_sum(self, x: Tensor) -> Tensor:
        return x

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x, size


IDENTITY = _Identity()


@dataclass(frozen=True)
class BipartiteMatching:
    """The r rows to remove, and the rows that they merge into.

    row (B, N): a permutation of the rows of the flattened (B·N, C) input: the kept rows in their
        new order, then the removed rows.
    joins (B, N - r, r): whether a removed row merges into a kept row. Merging is a matmul with a
        0/1 matrix. It allows several rows to share one destination without scatter_add, which
        export formats and engines implement differently.
    """

    row: Tensor
    joins: Tensor

    def merge_sum(self, x: Tensor) -> Tensor:
        kept, merged = self._split(x)
        return kept + self.joins.to(x.dtype) @ merged

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, merged = self._split(x)
        if size is None:
            # Half precision cannot count patches.
            ones = self.joins.to(torch.promote_types(x.dtype, torch.float32))
            total = ones.sum(dim=-1, keepdim=True) + 1
            return (kept + ones.to(x.dtype) @ merged) / total.to(x.dtype), total
        kept_size, merged_size = self._split(size)
        share = torch.where(self.joins, merged_size.transpose(1, 2), 0.0)  # (B, N - r, r)
        total = kept_size + share.sum(dim=-1, keepdim=True)
        return kept * (kept_size / total).to(x.dtype) + (share / total).to(x.dtype) @ merged, total

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept and the removed rows. functional.embedding exports as a single Gather."""
        rows = functional.embedding(self.row, x.flatten(0, 1))
        n_kept, n_merged = int(self.joins.shape[1]), int(self.joins.shape[2])
        kept, merged = torch.split(rows, [n_kept, n_merged], dim=1)
        return kept, merged


def bipartite_soft_matching(metric: Tensor, r: int, *, n_protected: int = 1) -> Matching:
    """Match tokens 0, 2, 4 … (A) to 1, 3, 5 … (B) by cosine similarity; the r best pairs merge.

    The first `n_protected` tokens (class, distillation, registers) take no part. Several tokens of
    A may merge into the same token of B. Order of the result: protected tokens, the rest of A, then
    B, each in its previous order, so that the next block pairs other tokens. Ties go to the lower
    index.

    Shapes: metric (B, N, D)
    Raises: ValueError where r is negative or more than `max_r(N, n_protected)`.
    """
    n_tokens = checked_tokens(metric, r, n_protected)
    if r == 0:
        return IDENTITY
    # A discrete choice has no gradient.
    metric = metric.detach()
    return match_by_scores(cosine_scores(metric, n_protected), r, n_tokens=n_tokens, n_protected=n_protected)


def cosine_scores(metric: Tensor, n_protected: int = 1) -> Tensor:
    """Return the cosine similarities of A and B without protected tokens, always in float32.

    Shapes: (B, N, D) -> (B, |A|, |B|), both without the protected tokens
    """
    if torch.is_autocast_enabled(metric.device.type):
        with torch.autocast(metric.device.type, enabled=False):
            return cosine_scores(metric.float(), n_protected)
    metric = unit_rows(metric)
    first_a, first_b = first_free(n_protected)
    return metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)


def unit_rows(metric: Tensor) -> Tensor:
    """Scale each row to length 1; zeros stay zeros. Shapes: (B, N, D) -> the same"""
    rows: Tensor = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows


def match_by_scores(scores: Tensor, r: int, *, n_tokens: int, n_protected: int = 1) -> Matching:
    """Merge the r tokens of A with the highest scores, each into its best match in B.

    Shapes: scores (B, |A|, |B|) as `cosine_scores` gives them
    """
    if r == 0:
        return IDENTITY
    best, partner = scores.max(dim=-1)
    order = descending(best)  # (B, |A|)
    n_a, n_b = int(scores.shape[1]), int(scores.shape[2])
    merged, rest = torch.split(order, [r, n_a - r], dim=1)
    # B comes last.
    place = torch.arange(n_tokens - r, device=scores.device) - (n_protected + n_a - r)
    joins = partner.gather(1, merged).unsqueeze(1) == place.unsqueeze(1)  # (B, N - r, r)
    return BipartiteMatching(_rows(merged, rest, n_b, n_tokens, n_protected), joins)


def descending(best: Tensor) -> Tensor:
    """Return indices from the highest to the lowest value; ties go to the lower index.

    ONNX's TopK guarantees that order. The exporter does not support a stable sort.
    """
    if torch.onnx.is_in_onnx_export():
        return best.topk(best.shape[-1], dim=-1).indices
    return best.sort(dim=-1, descending=True, stable=True).indices


def first_free(n_protected: int) -> tuple[int, int]:
    """Return the first unprotected token of A (even) and of B (odd)."""
    return n_protected + n_protected % 2, n_protected + 1 - n_protected % 2


def _rows(merged: Tensor, rest: Tensor, n_b: int, n_tokens: int, n_protected: int) -> Tensor:
    """Return the permutation of rows: protected, the rest of A, B, removed.

    Shapes: merged (B, r) and rest (B, |A| - r), indices within A -> (B, N), indices over all images
    """
    first_a, first_b = first_free(n_protected)
    device = merged.device
    # First row of each image.
    start = torch.arange(merged.shape[0], device=device).unsqueeze(1) * n_tokens
    a = start + first_a
    # Ascending, the previous order.
    rest = rest.topk(int(rest.shape[1]), dim=-1, largest=False).values
    b = start + torch.arange(first_b, first_b + 2 * n_b, 2, device=device)
    protected = start + torch.arange(n_protected, device=device)
    return torch.cat([protected, rest * 2 + a, b, merged * 2 + a], dim=1)


def checked_tokens(metric: Tensor, r: int, n_protected: int) -> int:
    """Return the number of tokens of a metric.

    Raises: ValueError where the metric has not three axes, or r or n_protected is out of range.
    """
    if metric.ndim != 3:
        raise ValueError(f"metric of shape {tuple(metric.shape)}: expected (images, tokens, width)")
    # A constant of exported graphs.
    n_tokens = int(metric.shape[1])
    if not 0 <= n_protected <= n_tokens:
        raise ValueError(f"n_protected must be from 0 to the {n_tokens} tokens, not {n_protected}")
    limit = max_r(n_tokens, n_protected)
    if not 0 <= r <= limit:
        raise ValueError(f"r must be from 0 to {limit} for {n_tokens} tokens ({n_protected} protected), not {r}")
    return n_tokens
