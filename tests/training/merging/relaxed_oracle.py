"""Relaxed grouping by its formula, differentiated by autograd."""

import torch
from torch import Tensor

from training.merging.relaxed import EPSILON, Relaxation


def grouping(scores: Tensor, r: int, relaxation: Relaxation) -> Tensor:
    """Return the share of each token of A that moves into each token of B.

    Shapes: (B, |A|, |B|) -> (B, |A|, |B|)
    Source: arXiv 2412.10569, equations 6 and 7.
    """
    kept, partners = scores.topk(relaxation.n_partners, dim=-1)
    u = kept / relaxation.tau1
    total = torch.zeros_like(kept)
    for _ in range(r):
        p = (u / relaxation.tau2).flatten(1).softmax(-1).view_as(u)
        total = total + p
        u = u + torch.log((1 - p.sum(-1, keepdim=True)).clamp_min(EPSILON))
    excess = (total.sum(-1, keepdim=True).detach() - 1).clamp_min(0)
    return torch.zeros_like(scores).scatter(-1, partners, total / (1 + excess))
