"""Scores: the similarities by which a model decides what merges, taken out of it or put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from training.merging.adaptive import match_candidates
from training.merging.matching import Matching, cosine_scores, match_by_scores
from training.models.frozen import FrozenModule
from training.tasks.task import output_tensors


@contextmanager
def steered(module: FrozenModule, choose: Callable[[Tensor, Callable[[Tensor], Matching]], Tensor]) -> Iterator[None]:
    """Let `choose` replace the scores by which the model decides, in each block that merges.

    choose: (own scores, match) -> scores, where `match` returns the matching that scores lead to.
    """
    model: Any = module.model

    def decide(metric: Tensor, r: int) -> Matching:
        def match(scores: Tensor) -> Matching:
            return match_by_scores(scores, r, n_tokens=int(metric.shape[1]), n_protected=model.n_protected)

        return match(choose(cosine_scores(metric, model.n_protected), match))

    def decide_similar(block: int, metric: Tensor, size: Tensor) -> Matching:
        found = model.candidates(block, metric, size)
        threshold = model.thresholds.per_block(len(model.vit.blocks))[block]

        def match(scores: Tensor) -> Matching:
            return match_candidates(found._replace(scores=scores), threshold, model.n_protected)

        return match(choose(found.scores, match))

    name, method = ("decide_similar", decide_similar) if module.is_adaptive else ("decide", decide)
    setattr(model, name, method)
    try:
        yield
    finally:
        delattr(model, name)


class ShownScores(nn.Module):
    """A module that also returns its scores, in the order of its blocks."""

    def __init__(self, module: FrozenModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Shapes: uint8 (B, H, W, 3) -> the module's outputs, and (B, |A|, |B|) for each block that merges"""
        shown: list[Tensor] = []

        def show(scores: Tensor, _: Any) -> Tensor:
            shown.append(scores)
            return scores

        with steered(self.module, show):
            outputs = output_tensors(self.module(pixels))
        return (*outputs, *shown)


def n_decisions(module: FrozenModule) -> int:
    """Return the number of blocks that decide what merges."""
    model: Any = module.model
    if module.is_adaptive:
        return sum(threshold < 1 for threshold in model.thresholds.per_block(len(model.vit.blocks)))
    return sum(r > 0 for r in model.schedule)
