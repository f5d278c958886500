"""Adaptive token merging (ATM): all pairs of tokens above a similarity threshold merge.

In a batch, an image's tokens come first, in the same order as in a batch of one. The rows after
them are absent: all zeros, of size 0, excluded from matching and attention. So results are
batch-invariant.
Source: arXiv 2505.15160.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from training.merging.matching import IDENTITY, Matching, descending, first_free, unit_rows

Split: TypeAlias = Literal["alternating", "size"]
"""alternating: A = tokens 0, 2, 4 …, B = 1, 3, 5 …, as in ToMe. size: A is the half with the
smaller tokens, B the other, so that two large tokens never merge (size-distinctive matching)."""

Score: TypeAlias = Literal["similarity", "error"]
"""similarity: the cosine. error: 1 - 2·m_i·m_j / (m_i + m_j)·(1 - cos), Ward's linkage. It equals
the cosine for two single patches, and falls with the number of patches."""


@dataclass(frozen=True)
class Thresholds:
    """theta_l = max(alpha - (exp(beta·(l - 1)) - 1), floor) for block l = 1 … L, falling with depth.

    split_depth: number of blocks with alternating split; later blocks split by size. score:
        compared with the threshold.
    Raises: ValueError naming the field and the accepted values.
    Source: arXiv 2505.15160 for the formula. Its values are not available, so ours are calibrated.
    """

    alpha: float
    beta: float
    floor: float
    split_depth: int
    score: Score = "similarity"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "floor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} {value!r}: expected a finite number")
        if self.beta < 0:
            raise ValueError(f"beta {self.beta!r}: expected a number from 0, since thresholds must not rise with depth")
        if isinstance(self.split_depth, bool) or not isinstance(self.split_depth, int) or self.split_depth < 0:
            raise ValueError(f"split_depth {self.split_depth!r}: expected a whole number of blocks from 0")
        if self.score not in get_args(Score):
            raise ValueError(f"score {self.score!r}: expected one of {', '.join(get_args(Score))}")

    def per_block(self, depth: int) -> tuple[float, ...]:
        """Return the threshold of each of `depth` blocks."""
        return tuple(max(self.alpha - math.expm1(self.beta * block), self.floor) for block in range(depth))

    def split(self, block: int) -> Split:
        """Return the split of block 0, 1, …"""
        return "alternating" if block < self.split_depth else "size"


@dataclass(frozen=True)
class AdaptiveMatching:
    """A decided matching with a different number of rows per image.

    a (B, |A|) and b (B, |B|): indices of the two halves. joins (B, |B|, |A|): whether a token of A
        merges into one of B.
    kept (B, N'): indices into [protected, A, B] of the rows that stay; the first n_kept (B, 1) are
        valid.
    """

    n_protected: int
    a: Tensor
    b: Tensor
    joins: Tensor
    kept: Tensor
    n_kept: Tensor

    def merge_sum(self, x: Tensor) -> Tensor:
        protected, a, b = self._parts(x)
        return self._left([protected, a, b + self.joins.to(x.dtype) @ a])

    def merge_mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if size is None:
            size = torch.ones_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
        protected, a, b = self._parts(x)
        sizes = self._parts(size)
        joining = torch.where(self.joins, sizes[1].transpose(1, 2), 0.0)  # (B, |B|, |A|)
        total = sizes[2] + joining.sum(dim=-1, keepdim=True)
        # Absent rows have total 0 and no summands.
        share = 1 / total.clamp_min(1)
        merged = b * (sizes[2] * share).to(x.dtype) + (joining * share).to(x.dtype) @ a
        return self._left([protected, a, merged]), self._left([sizes[0], sizes[1], total])

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (_rows(x, half) for half in (self.a, self.b))
        return x[:, : self.n_protected], a, b

    def _left(self, parts: list[Tensor]) -> Tensor:
        rows = _rows(torch.cat(parts, dim=1), self.kept)
        is_present = torch.arange(rows.shape[1], device=rows.device) < self.n_kept
        return torch.where(is_present.unsqueeze(-1), rows, 0.0)


class Candidates(NamedTuple):
    """Both halves and the scores of all pairs.

    Shapes: a, is_a (B, |A|); b, is_b (B, |B|); scores (B, |A|, |B|), -inf where a token is absent
    """

    a: Tensor
    b: Tensor
    is_a: Tensor
    is_b: Tensor
    scores: Tensor


def adaptive_matching(
    metric: Tensor,
    size: Tensor | None,
    threshold: float,
    *,
    split: Split = "alternating",
    score: Score = "similarity",
    n_protected: int = 1,
) -> Matching:
    """Match each token of A to its best match in B; pairs above the threshold merge.

    Several tokens of A may merge into the same token of B. Ties go to the lower position in B.
    Order of the result: protected tokens, the rest of A, then B, then absent rows up to the longest
    image of the batch.

    Shapes: metric (B, N, D); size (B, N, 1), 0 where a row is absent, or None where every token is
        one patch
    """
    if metric.shape[1] - n_protected < 2:
        return IDENTITY
    found = candidates(metric, size, split=split, score=score, n_protected=n_protected)
    return match_candidates(found, threshold, n_protected)


def match_candidates(found: Candidates, threshold: float, n_protected: int = 1) -> AdaptiveMatching:
    """Merge each token of A whose best score is above the threshold."""
    best, partner = found.scores.max(dim=-1)
    return merge_candidates(found, best > threshold, partner, n_protected)


def merge_candidates(found: Candidates, merges: Tensor, partner: Tensor, n_protected: int = 1) -> AdaptiveMatching:
    """Merge some tokens of A, each into its partner.

    Shapes: merges bool, partner int64 (B, |A|), positions in B
    """
    a, b, is_a, is_b, _ = found
    places = torch.arange(b.shape[1], device=a.device)
    joins = merges.unsqueeze(1) & (partner.unsqueeze(1) == places.unsqueeze(-1))
    stays = torch.cat([torch.ones_like(is_a[:, :1]).expand(-1, n_protected), is_a & ~merges, is_b], dim=1)
    n_kept = stays.sum(dim=1, keepdim=True)
    order = descending(stays.float())
    return AdaptiveMatching(n_protected, a, b, joins, order[:, : _n_rows(n_kept, n_protected, order)], n_kept)


def candidates(metric: Tensor, size: Tensor | None, *, split: Split, score: Score, n_protected: int = 1) -> Candidates:
    """Split tokens into halves and score all pairs.

    Shapes: as `adaptive_matching`, with two unprotected tokens or more
    """
    # Float32 avoids ties, as in `cosine_scores`.
    if torch.is_autocast_enabled(metric.device.type):
        with torch.autocast(metric.device.type, enabled=False):
            return candidates(metric, size, split=split, score=score, n_protected=n_protected)
    metric = metric.detach().float() if metric.dtype in (torch.float16, torch.bfloat16) else metric.detach()
    if size is None:
        size = torch.ones_like(metric[..., :1])
    a, b, is_a, is_b = _halves(size.squeeze(-1), split, n_protected)
    metric = unit_rows(metric)
    scores = _rows(metric, a) @ _rows(metric, b).transpose(1, 2)
    if score == "error":
        of_a, of_b = _rows(size, a), _rows(size, b).transpose(1, 2)
        scores = 1 - 2 * of_a * of_b / (of_a + of_b).clamp_min(1) * (1 - scores)
    scores = scores.masked_fill(~(is_a.unsqueeze(2) & is_b.unsqueeze(1)), -torch.inf)
    return Candidates(a, b, is_a, is_b, scores)


def _n_rows(n_kept: Tensor, n_protected: int, order: Tensor) -> int:
    """Return the largest number of rows that an image keeps, at least enough for the next matching.

    The checks give the exporter, which has no concrete numbers, the range of the result.
    """
    longest = n_kept.max().clamp_min(n_protected + 2)
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        # A Python number would become a constant of the graph.
        return cast(int, longest)
    n_rows = cast(int, longest.item())
    torch._check(n_rows >= n_protected + 2)
    torch._check(n_rows <= order.shape[1])
    return n_rows


def half_sizes(n_tokens: Tensor, split: Split, n_protected: int) -> tuple[Tensor, Tensor]:
    """Return the sizes of A and B for a number of tokens. Shapes: int64, any"""
    n_free = (n_tokens - n_protected).clamp_min(0)
    starts_with_a = split == "alternating" and n_protected % 2 == 0
    n_a = (n_free + 1) // 2 if starts_with_a else n_free // 2
    return n_a, n_free - n_a


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Select rows of each image with a single Gather. Shapes: (B, N, C), (B, K) -> (B, K, C)"""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return functional.embedding(places + first, x.flatten(0, 1))


def _halves(size: Tensor, split: Split, n_protected: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return indices of A and B, and which of them are present.

    Shapes: (B, N) -> (B, |A|), (B, |B|) twice
    """
    n_images, n_tokens = size.shape
    if split == "alternating":
        first_a, first_b = first_free(n_protected)
        a, b = (
            torch.arange(first, n_tokens, 2, device=size.device).expand(n_images, -1) for first in (first_a, first_b)
        )
        return a, b, size.gather(1, a) > 0, size.gather(1, b) > 0
    if split != "size":
        raise ValueError(f"split {split!r}: expected one of {', '.join(get_args(Split))}")
    size = size[:, n_protected:]
    n_free, n_present = size.shape[1], (size > 0).sum(dim=1, keepdim=True)
    rising = descending(torch.where(size > 0, -size, -torch.inf))
    of_a, of_b = (
        torch.arange(n_half, device=size.device).expand(n_images, -1) for n_half in (n_free // 2, n_free - n_free // 2)
    )
    is_a, is_b = of_a < n_present // 2, of_b < n_present - n_present // 2
    a, b = rising.gather(1, of_a), rising.gather(1, (n_present - 1 - of_b).clamp_min(0))
    return a + n_protected, b + n_protected, is_a, is_b
