"""Relaxed merging: bipartite soft matching in a continuous form that a loss can train.

All tokens stay, with sizes that may approach 0. The share of a token of A that moves into a token
of B is a number from 0 to 1 with a gradient. As tau2 approaches 0 at fixed tau1, the result
approaches that of `bipartite_soft_matching`, with the same tokens in the same order. Computed in
float32 (float64 for such a metric), also under autocast.
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
    """The softness of the grouping."""

    tau1: float = 0.1
    """Scale of the similarities, before picked tokens are suppressed."""
    tau2: float = 0.1
    """Temperature of each pick."""
    n_partners: int = 3
    """Tokens of B that a token of A may move into; all others get exactly 0. Unit: tokens."""

    def __post_init__(self) -> None:
        if self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(f"tau1 {self.tau1} and tau2 {self.tau2} must be above 0")
        if self.n_partners < 1:
            raise ValueError(f"n_partners {self.n_partners}: expected at least 1")


def soft_grouping(scores: Tensor, r: int, relaxation: Relaxation | None = None) -> Tensor:
    """Return the share of each token of A that moves into each token of B: rows sum to at most 1.

    The paper iterates p = softmax(u / tau2) over all kept entries of an image. That equals a
    softmax within each row times a softmax over rows. Suppression lowers whole rows, so the softmax
    within rows never changes, and only the one over rows needs to be iterated: the same result with
    n_partners times less arithmetic in the loop.

    Shapes: scores (B, |A|, |B|), r from 0 to |A| -> (B, |A|, |B|). Memory for the gradient: r·B·|A|
        numbers
    Source: arXiv 2412.10569, equations 6 and 7.
    """
    chosen = relaxation or Relaxation()
    sharpness = chosen.tau1 * chosen.tau2
    best, partners = scores.topk(min(chosen.n_partners, int(scores.shape[-1])), dim=-1)
    within = (best / sharpness).softmax(dim=-1)
    picked: Tensor = _Picks.apply((best / sharpness).logsumexp(dim=-1), r, chosen.tau2)
    # A token cannot be picked more than once in total.
    picked = picked / picked.detach().clamp_min(1)
    return torch.zeros_like(scores).scatter(-1, partners, within * picked.unsqueeze(-1))


class _Picks(torch.autograd.Function):
    """Pick r rows softly, one after another; return the weight of each row, (B, |A|).

    The gradient is written by hand: autograd would store five tensors per pick and launch twenty
    kernels instead of six.
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
        # Gradient of the suppressed logits, over later picks.
        grad_logits = torch.zeros_like(grad)
        for pick in picks.flip(0):
            left = 1 - pick
            # log max(1 - p, eps) has no gradient where the maximum is eps.
            grad_pick = grad - grad_logits / (ctx.tau2 * left.clamp_min(EPSILON)) * (left > EPSILON)
            through = pick * grad_pick
            grad_logits = grad_logits + through - pick * through.sum(-1, keepdim=True)
        return grad_logits, None, None


@dataclass(frozen=True)
class RelaxedMatching:
    """A decided relaxed matching.

    share: (B, |A|, |B|), see `soft_grouping`. n_active: number of leading tokens that take part;
        the others are the tail, tokens that merged in earlier blocks. n_protected: leading active
        tokens that take no part.
    """

    share: Tensor
    r: int
    n_active: int
    n_protected: int

    def merge(self, x: Tensor, size: Tensor, *, keep_tail: bool = True) -> tuple[Tensor, Tensor]:
        """Move shares of A into B, and move the r smallest remaining tokens of A to the tail.

        Order of the result: protected, the rest of A, B, each in its previous order, as after a
        hard merge; then the new tail and the previous tail, which keep_tail=False omits.

        Shapes: x (B, N, C), size (B, N, 1) -> the same, or n_active - r tokens without the tail.
            Sizes keep their sum.
        Differs from the paper: its code sorts all active tokens by size; here the order is that of
            inference.
        """
        first_a, first_b = first_free(self.n_protected)
        a, b = slice(first_a, self.n_active, 2), slice(first_b, self.n_active, 2)
        with torch.autocast(x.device.type, enabled=False):
            x, size = x.to(self.share.dtype), size.to(self.share.dtype)
            moved = (self.share * size[:, a]).transpose(1, 2)  # (B, |B|, |A|)
            size_b = size[:, b] + moved.sum(-1, keepdim=True)
            x_b = (size[:, b] * x[:, b] + moved @ x[:, a]) / size_b
            left = 1 - self.share.sum(-1, keepdim=True)
            # Rounding may leave [0, 1]; clamp the value but not the gradient.
            left = left + (left.clamp(0, 1) - left).detach()
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
        """Return the order of the active tokens.

        Shapes: (B, |A|) -> (B, n_active), indices in [protected, A, B]
        """
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
    """Match tokens 0, 2, 4 … (A) softly to tokens 1, 3, 5 … (B) by cosine similarity.

    The split is that of `bipartite_soft_matching`, so that training matches inference. The loss
    reaches the metric only through the matching.

    Shapes: metric (B, N, D) of the active tokens
    Raises: ValueError where r is negative or more than `max_r(N, n_protected)`.
    Differs from the paper: its code trains with A = 1, 3, 5 … and B = 2, 4, 6 …
    """
    n_tokens = checked_tokens(metric, r, n_protected)
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    with torch.autocast(metric.device.type, enabled=False):
        share = soft_grouping(cosine_scores(metric, n_protected), r, relaxation)
    return RelaxedMatching(share, r, n_tokens, n_protected)
