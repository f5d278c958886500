"""Adaptive token merging (ATM): every pair merges that is similar enough, so each image keeps a number of its own.

In a batch an image's own tokens stand first, in the order that they would have alone. The rows after them are absent:
all zeros, of size 0, matched with nothing and attended to by nobody. So an answer does not depend on who shares the
batch.
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
"""alternating: A = tokens 0, 2, 4 …, B = 1, 3, 5 …, as ToMe. size: the smaller half is A, the larger B, so that two
large tokens never merge (size-distinctive matching)."""

Score: TypeAlias = Literal["similarity", "error"]
"""similarity: the cosine. error: 1 - 2·m_i·m_j / (m_i + m_j)·(1 - cos), Ward's linkage, which for two single patches is
the cosine, and the lower the more patches a merge would blur."""


@dataclass(frozen=True)
class Thresholds:
    """theta_l = max(alpha - (exp(beta·(l - 1)) - 1), floor) for block l = 1 … L: strict early, for losses add up.

    split_depth: how many blocks split tokens alternately before the rest split them by size.
    score: what has to exceed the threshold.
    Raises: ValueError naming the field and what it expects.
    Source: arXiv 2505.15160, as reported; values are calibrated, for the paper's could not be had.
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
            raise ValueError(f"beta {self.beta!r}: expected a number from 0; thresholds do not rise with depth")
        if isinstance(self.split_depth, bool) or not isinstance(self.split_depth, int) or self.split_depth < 0:
            raise ValueError(f"split_depth {self.split_depth!r}: expected a whole number of blocks from 0")
        if self.score not in get_args(Score):
            raise ValueError(f"score {self.score!r}: expected one of {', '.join(get_args(Score))}")

    def per_block(self, depth: int) -> tuple[float, ...]:
        """Return the threshold of each of `depth` blocks."""
        return tuple(max(self.alpha - math.expm1(self.beta * block), self.floor) for block in range(depth))

    def split(self, block: int) -> Split:
        """Return how block 0, 1, … splits its tokens."""
        return "alternating" if block < self.split_depth else "size"


@dataclass(frozen=True)
class AdaptiveMatching:
    """What merges, and which rows are left of each image.

    a (B, |A|) and b (B, |B|): tokens of the two halves; joins (B, |B|, |A|): whether one of A merges into one of B.
    kept (B, N'): of protected tokens, A and B, laid end to end, the rows that stay, n_kept (B, 1) of them, then any.
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
        share = 1 / total.clamp_min(1)  # of absent rows, whose total is 0, nothing
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
    """What could merge. Shapes: a, is_a (B, |A|); b, is_b (B, |B|); scores (B, |A|, |B|), -inf where one is absent"""

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
    """Match each token of A to its best of B, and merge the pairs that score above the threshold.

    Several of A may choose the same of B; between equal scores the lower place in B wins. Order of the result:
    protected tokens, the rest of A, then B, then absent rows up to the most that an image of the batch keeps.

    Shapes: metric (B, N, D); size (B, N, 1), 0 where a row is absent, or None where every token is one patch
    """
    if metric.shape[1] - n_protected < 2:
        return IDENTITY
    found = candidates(metric, size, split=split, score=score, n_protected=n_protected)
    best, partner = found.scores.max(dim=-1)
    return merge_candidates(found, best > threshold, partner, n_protected)


def merge_candidates(found: Candidates, merges: Tensor, partner: Tensor, n_protected: int = 1) -> AdaptiveMatching:
    """Merge some of A, each into its partner. Shapes: merges bool, partner int64 (B, |A|), a place in B"""
    a, b, is_a, is_b, _ = found
    places = torch.arange(b.shape[1], device=a.device)
    joins = merges.unsqueeze(1) & (partner.unsqueeze(1) == places.unsqueeze(-1))
    stays = torch.cat([torch.ones_like(is_a[:, :1]).expand(-1, n_protected), is_a & ~merges, is_b], dim=1)
    n_kept = stays.sum(dim=1, keepdim=True)
    order = descending(stays.float())
    return AdaptiveMatching(n_protected, a, b, joins, order[:, : _n_rows(n_kept, n_protected, order)], n_kept)


def candidates(metric: Tensor, size: Tensor | None, *, split: Split, score: Score, n_protected: int = 1) -> Candidates:
    """Split tokens in halves and score each pair across. Shapes: as `adaptive_matching`; at least two free tokens"""
    if torch.is_autocast_enabled(metric.device.type):  # half precision would make ties, as in `cosine_scores`
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
    """Return the most rows that an image keeps, and never fewer than could be matched again.

    The checks tell the exporter, which has no numbers to look at, what it may take for granted.
    """
    most = n_kept.max().clamp_min(n_protected + 2)
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call] # a number would be a constant of the graph
        return cast(int, most)
    n_rows = cast(int, most.item())
    torch._check(n_rows >= n_protected + 2)
    torch._check(n_rows <= order.shape[1])
    return n_rows


def half_sizes(n_tokens: Tensor, split: Split, n_protected: int) -> tuple[Tensor, Tensor]:
    """Return how many tokens A and B have of so many. Shapes: int64, any"""
    n_free = (n_tokens - n_protected).clamp_min(0)
    starts_with_a = split == "alternating" and n_protected % 2 == 0
    n_a = (n_free + 1) // 2 if starts_with_a else n_free // 2
    return n_a, n_free - n_a


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Take rows of each image, by one plain Gather. Shapes: (B, N, C), (B, K) -> (B, K, C)"""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return functional.embedding(places + first, x.flatten(0, 1))


def _halves(size: Tensor, split: Split, n_protected: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens of A and of B, and which of them are there. Shapes: (B, N) -> (B, |A|), (B, |B|) twice"""
    n_images, n_tokens = size.shape
    if split == "alternating":
        first_a, first_b = first_free(n_protected)
        a, b = (
            torch.arange(first, n_tokens, 2, device=size.device).expand(n_images, -1) for first in (first_a, first_b)
        )
        return a, b, size.gather(1, a) > 0, size.gather(1, b) > 0
    if split != "size":
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    size = size[:, n_protected:]
    n_free, n_present = size.shape[1], (size > 0).sum(dim=1, keepdim=True)
    rising = descending(torch.where(size > 0, -size, -torch.inf))
    of_a, of_b = (
        torch.arange(n_most, device=size.device).expand(n_images, -1) for n_most in (n_free // 2, n_free - n_free // 2)
    )
    is_a, is_b = of_a < n_present // 2, of_b < n_present - n_present // 2
    a, b = rising.gather(1, of_a), rising.gather(1, (n_present - 1 - of_b).clamp_min(0))
    return a + n_protected, b + n_protected, is_a, is_b
