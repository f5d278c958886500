"""Relaxed merging: bipartite soft matching made continuous, so that a loss can teach the metric what to merge.

Every token stays, with a size that may fade to nothing; how much of a token of A goes into one of B is a number from 0
to 1 with a gradient. As tau2 falls to 0 (tau1 as it is) it becomes `bipartite_soft_matching`, same tokens, same order.
Everything here is in float32 (float64 where the metric is), whatever the autocast.
Source: arXiv 2412.10569, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.merging.matching import checked_tokens, cosine_scores, first_free

EPSILON = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Relaxation:
    """How soft the grouping is.

    tau1: scale of the similarities before a token once picked is suppressed; tau2: temperature of each pick;
    n_partners: of how many of B a token of A may become part; the others get exactly 0.
    """

    tau1: float = 0.1
    tau2: float = 0.1
    n_partners: int = 3

    def __post_init__(self) -> None:
        if self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(f"tau1 {self.tau1} and tau2 {self.tau2} must be above 0")
        if self.n_partners < 1:
            raise ValueError(f"n_partners {self.n_partners}: a token of A needs at least one of B")


def soft_grouping(scores: Tensor, r: int, relaxation: Relaxation | None = None) -> Tensor:
    """Return how much of each token of A goes into each of B: rows sum to at most 1, all of them to about r.

    What is iterated r times is one number per token of A. The paper's p = softmax(u / tau2) over all kept entries of an
    image is the product of a softmax within each row, which suppression never changes (it lowers whole rows), and a
    softmax over rows; so only the latter is iterated: the same numbers by n_partners times less arithmetic in the loop.

    Shapes: scores (B, |A|, |B|), r from 0 to |A| -> (B, |A|, |B|). Memory for the gradient: r·B·|A| numbers.
    Source: arXiv 2412.10569, equations 6 and 7.
    """
    chosen = relaxation or Relaxation()
    sharpness = chosen.tau1 * chosen.tau2
    best, partners = scores.topk(min(chosen.n_partners, int(scores.shape[-1])), dim=-1)
    within = (best / sharpness).softmax(dim=-1)
    picked: Tensor = _Picks.apply((best / sharpness).logsumexp(dim=-1), r, chosen.tau2)
    picked = picked / picked.detach().clamp_min(1)  # no token goes away more than once
    return torch.zeros_like(scores).scatter(-1, partners, within * picked.unsqueeze(-1))


class _Picks(torch.autograd.Function):
    """Pick r rows softly, one after the other, each less likely once picked; return how often each was, (B, |A|).

    By hand, since autograd would keep five tensors a pick and run twenty kernels where these are six.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, r: int, tau2: float) -> Tensor:
        picks = logits.new_empty(r, *logits.shape)
        suppressed = logits.clone()
        for pick in picks:
            torch.softmax(suppressed, -1, out=pick)
            suppressed += (1 - pick).clamp_min_(EPSILON).log_().div_(tau2)
        ctx.save_for_backward(picks)
        ctx.tau2 = tau2
        return picks.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (picks,) = ctx.saved_tensors
        grad_logits = torch.zeros_like(grad)  # of everything that one pick's logits are made of, later picks included
        for pick in picks.flip(0):
            left = 1 - pick
            # log max(1 - p, eps): its gradient is none once eps holds
            grad_pick = grad - grad_logits / (ctx.tau2 * left.clamp_min(EPSILON)) * (left > EPSILON)
            through = pick * grad_pick
            grad_logits = grad_logits + through - pick * through.sum(-1, keepdim=True)
        return grad_logits, None, None


@dataclass(frozen=True)
class RelaxedMatching:
    """How much of each token goes where, ready to be applied.

    share: (B, |A|, |B|), see `soft_grouping`; n_active: the tokens that take part, the first ones; the rest, the tail,
    faded before; n_protected: of the active ones the first, which neither merge nor are merged into.
    """

    share: Tensor
    r: int
    n_active: int
    n_protected: int

    def merge(self, x: Tensor, size: Tensor, *, keep_tail: bool = True) -> tuple[Tensor, Tensor]:
        """Move shares of A into B; then put the r of A of which least is left behind the active tokens.

        Order of the result: protected, the rest of A, B, each in its order before (as after a hard merge), then those
        that faded now, then those that had before; keep_tail=False leaves both of those out.

        Shapes: x (B, N, C), size (B, N, 1) -> the same, or without the tail N = n_active - r. The sizes' sum stays.
        Differs from the paper: its code sorts all active tokens by size; here the order is that of inference.
        """
        first_a, first_b = first_free(self.n_protected)
        a, b = slice(first_a, self.n_active, 2), slice(first_b, self.n_active, 2)
        with torch.autocast(x.device.type, enabled=False):
            x, size = x.to(self.share.dtype), size.to(self.share.dtype)
            moved = (self.share * size[:, a]).transpose(1, 2)  # (B, |B|, |A|)
            size_b = size[:, b] + moved.sum(-1, keepdim=True)
            x_b = (size[:, b] * x[:, b] + moved @ x[:, a]) / size_b
            left = 1 - self.share.sum(-1, keepdim=True)
            left = left + (left.clamp(0, 1) - left).detach()  # rounding alone exceeds; the gradient passes
            size_a = size[:, a] * left
        order = self._order(size_a.detach().squeeze(-1))
        n_kept = self.n_active - self.r
        parts_x = [x[:, : self.n_protected], x[:, a], x_b, x[:, self.n_active :]]
        parts_size = [size[:, : self.n_protected], size_a, size_b, size[:, self.n_active :]]
        if not keep_tail:
            parts_x, parts_size, order = parts_x[:3], parts_size[:3], order[:, :n_kept]
        elif x.shape[1] > self.n_active:
            tail = torch.arange(self.n_active, int(x.shape[1]), device=x.device).expand(len(x), -1)
            order = torch.cat([order, tail], dim=1)
        index = order.unsqueeze(-1)
        tokens = torch.cat(parts_x, 1).gather(1, index.expand(-1, -1, int(x.shape[-1])))
        return tokens, torch.cat(parts_size, 1).gather(1, index)

    def _order(self, size_a: Tensor) -> Tensor:
        """Shapes: (B, |A|) -> (B, n_active), places within [protected, A, B]"""
        n_a, n_b = int(self.share.shape[1]), int(self.share.shape[2])
        n_images = len(size_a)
        largest_first = size_a.argsort(dim=-1, descending=True, stable=True)
        rest, faded = torch.split(largest_first, [n_a - self.r, self.r], dim=-1)
        places = torch.arange(self.n_protected + n_a + n_b, device=size_a.device).expand(n_images, -1)
        protected, _, b = torch.split(places, [self.n_protected, n_a, n_b], dim=1)
        return torch.cat([protected, rest.sort(-1).values + self.n_protected, b, faded + self.n_protected], dim=1)


def relaxed_matching(
    metric: Tensor, r: int, relaxation: Relaxation | None = None, *, n_protected: int = 1
) -> RelaxedMatching:
    """Group the tokens of A = 0, 2, 4 … softly with those of B = 1, 3, 5 … by cosine similarity.

    The same split as `bipartite_soft_matching`, so that what is learnt is what inference does. The loss reaches the
    metric through the matching alone.

    Shapes: metric (B, N, D) of the active tokens
    Raises: ValueError where r is negative or more than `max_r(N, n_protected)`.
    Differs from the paper: its code trains on A = 1, 3, 5 … and B = 2, 4, 6 … .
    """
    n_tokens = checked_tokens(metric, r, n_protected)
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    with torch.autocast(metric.device.type, enabled=False):
        share = soft_grouping(cosine_scores(metric, n_protected), r, relaxation)
    return RelaxedMatching(share, r, n_tokens, n_protected)
