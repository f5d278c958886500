"""A matching says which tokens merge into which; deciding it is apart from applying it.

Decided once from a metric, a matching applies to anything that has one row per token: features, sizes, source map.
Source: arXiv 2210.09461, section 3, bipartite soft matching.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from training.merging.schedule import max_r


class Matching(Protocol):
    """What to merge, ready to be applied. Rows of every group that merges become one row."""

    def merge_sum(self, x: Tensor) -> Tensor:
        """Add up the rows of each group. Shapes: (B, N, C) -> (B, N - r, C)"""
        ...

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Average the rows of each group, weighted by size, and add up the sizes.

        Shapes: x (B, N, C), size (B, N, 1) or None for all ones -> (B, N - r, C), (B, N - r, 1);
            size stays None only where nothing merges.
        """
        ...


class _Identity:
    """Merge nothing: what r = 0 gives, so that callers never branch."""

    def merge_sum(self, x: Tensor) -> Tensor:
        return x

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x, size


IDENTITY = _Identity()


@dataclass(frozen=True)
class BipartiteMatching:
    """The r rows to merge away, and the rows that they merge into.

    row (B, N): a permutation of the rows of the flattened (B·N, C) input: those to keep in their new order, then those
        to merge away.
    joins (B, N - r, r): whether the r-th row to merge away goes into a kept row.
    Each row is copied once, and a merge is a matmul with a 0/1 matrix: several rows may share one destination, without
    the scatter_add that export formats and engines disagree on.
    """

    row: Tensor
    joins: Tensor

    def merge_sum(self, x: Tensor) -> Tensor:
        kept, merged = self._split(x)
        return kept + self.joins.to(x.dtype) @ merged

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, merged = self._split(x)
        if size is None:
            ones = self.joins.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot count patches
            total = ones.sum(dim=-1, keepdim=True) + 1
            return (kept + ones.to(x.dtype) @ merged) / total.to(x.dtype), total
        kept_size, merged_size = self._split(size)
        share = torch.where(self.joins, merged_size.transpose(1, 2), 0.0)  # (B, N - r, r)
        total = kept_size + share.sum(dim=-1, keepdim=True)
        return kept * (kept_size / total).to(x.dtype) + (share / total).to(x.dtype) @ merged, total

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that stay and the rows that merge away. An embedding lookup is one plain Gather of rows."""
        rows = functional.embedding(self.row, x.flatten(0, 1))
        n_kept, n_merged = int(self.joins.shape[1]), int(self.joins.shape[2])
        kept, merged = torch.split(rows, [n_kept, n_merged], dim=1)
        return kept, merged


def bipartite_soft_matching(metric: Tensor, r: int, *, n_protected: int = 1) -> Matching:
    """Match tokens 0, 2, 4 … (A) to tokens 1, 3, 5 … (B) by cosine similarity, and merge the r best of A away.

    The first `n_protected` tokens (class, distillation, registers) neither merge nor are merged into. Several of A may
    choose the same of B. Order of the result: protected tokens, the rest of A, then B, each in its order before, so
    that the next block pairs other tokens. Between equal scores the lower index wins.

    Shapes: metric (B, N, D)
    Raises: ValueError where r is negative or more than `max_r(N, n_protected)`.
    """
    n_tokens = checked_tokens(metric, r, n_protected)
    if r == 0:
        return IDENTITY
    metric = metric.detach()  # a choice has no gradient
    return match_by_scores(cosine_scores(metric, n_protected), r, n_tokens=n_tokens, n_protected=n_protected)


def cosine_scores(metric: Tensor, n_protected: int = 1) -> Tensor:
    """Return the cosine similarity of A's free tokens and B's; under autocast in float32, where half would make ties.

    Shapes: (B, N, D) -> (B, |A|, |B|), both without the protected tokens
    """
    if torch.is_autocast_enabled(metric.device.type):
        with torch.autocast(metric.device.type, enabled=False):
            return cosine_scores(metric.float(), n_protected)
    metric = unit_rows(metric)
    first_a, first_b = first_free(n_protected)
    return metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)


def unit_rows(metric: Tensor) -> Tensor:
    """Scale each token's row to length 1; zeros stay zeros. Shapes: (B, N, D) -> the same"""
    rows: Tensor = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows


def match_by_scores(scores: Tensor, r: int, *, n_tokens: int, n_protected: int = 1) -> Matching:
    """Merge away the r of A whose best score is highest, each into its best of B.

    Shapes: scores (B, |A|, |B|) as `cosine_scores` gives them
    """
    if r == 0:
        return IDENTITY
    best, partner = scores.max(dim=-1)
    order = descending(best)  # (B, |A|)
    n_a, n_b = int(scores.shape[1]), int(scores.shape[2])
    merged, rest = torch.split(order, [r, n_a - r], dim=1)
    place = torch.arange(n_tokens - r, device=scores.device) - (n_protected + n_a - r)  # B stands last in the result
    joins = partner.gather(1, merged).unsqueeze(1) == place.unsqueeze(1)  # (B, N - r, r)
    return BipartiteMatching(_rows(merged, rest, n_b, n_tokens, n_protected), joins)


def descending(best: Tensor) -> Tensor:
    """Return indices from highest to lowest, the lower index first among equals.

    ONNX's TopK does so by its specification; the exporter knows no sort that says it is stable.
    """
    if torch.onnx.is_in_onnx_export():
        return best.topk(best.shape[-1], dim=-1).indices
    return best.sort(dim=-1, descending=True, stable=True).indices


def first_free(n_protected: int) -> tuple[int, int]:
    """Return the first token of A (even) and of B (odd) that is not protected."""
    return n_protected + n_protected % 2, n_protected + 1 - n_protected % 2


def _rows(merged: Tensor, rest: Tensor, n_b: int, n_tokens: int, n_protected: int) -> Tensor:
    """Return the rows to copy: protected, the rest of A, B, those to merge away.

    Shapes: merged (B, r) and rest (B, |A| - r), counted within A -> (B, N), counted over all images
    """
    first_a, first_b = first_free(n_protected)
    device = merged.device
    start = torch.arange(merged.shape[0], device=device).unsqueeze(1) * n_tokens  # an image's first row
    a = start + first_a
    rest = rest.topk(int(rest.shape[1]), dim=-1, largest=False).values  # back in their order before
    b = start + torch.arange(first_b, first_b + 2 * n_b, 2, device=device)
    protected = start + torch.arange(n_protected, device=device)
    return torch.cat([protected, rest * 2 + a, b, merged * 2 + a], dim=1)


def checked_tokens(metric: Tensor, r: int, n_protected: int) -> int:
    """Return how many tokens a metric is of.

    Raises: ValueError where it is no metric, or r or n_protected is not possible with it.
    """
    if metric.ndim != 3:
        raise ValueError(f"a metric is (images, tokens, width), not {tuple(metric.shape)}")
    n_tokens = int(metric.shape[1])  # a constant in every exported graph
    if not 0 <= n_protected <= n_tokens:
        raise ValueError(f"n_protected must be from 0 to the {n_tokens} tokens there are, not {n_protected}")
    limit = max_r(n_tokens, n_protected)
    if not 0 <= r <= limit:
        raise ValueError(f"r must be from 0 to {limit} for {n_tokens} tokens ({n_protected} protected), not {r}")
    return n_tokens
