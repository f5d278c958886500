"""Proof that a graph computes what eager computes, on inputs that exercise merging.

Merging decides by comparing floating-point scores. Where two scores differ by less than the rounding of two correct
implementations, each may merge another pair, and the logits then differ for a reason that is no error. So inputs for
parity are those whose every decision is clear by `MIN_MARGIN`, and in which several tokens share a destination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.merging.matching import Matching, cosine_scores
from training.models.classifier import ServedClassifier

MIN_MARGIN = 3e-6  # of cosines: fifty roundings of float32; median over images of a trained model: 2e-6
BATCHES = (1, 2, 32)
_BATCH = 64


class ParityError(RuntimeError):
    """An exported graph differs from eager by more than the stated tolerance, or could not be put to the test."""


@dataclass(frozen=True)
class Decisions:
    """How clearly each image was decided. Shapes: margin (B,), of cosines; sharing (B,), tokens in company."""

    margin: Tensor
    sharing: Tensor


@contextmanager
def _recorded(classifier: ServedClassifier) -> Iterator[list[tuple[int, Tensor]]]:
    """Record what each block decides by while the classifier runs."""
    model: Any = classifier.model
    seen: list[tuple[int, Tensor]] = []

    def decide(metric: Tensor, r: int) -> Matching:
        seen.append((r, cosine_scores(metric, model.n_protected)))
        return type(model).decide(model, metric, r)  # type: ignore[no-any-return]

    model.decide = decide
    try:
        yield seen
    finally:
        del model.decide


@torch.no_grad()
def decisions(classifier: ServedClassifier, pixels: Tensor) -> Decisions:
    """Measure the smallest gap between what was chosen and the next best, over all blocks, for each image."""
    parts = [_decisions(classifier, part) for part in torch.split(pixels, _BATCH)]
    return Decisions(torch.cat([part.margin for part in parts]), torch.cat([part.sharing for part in parts]))


def _decisions(classifier: ServedClassifier, pixels: Tensor) -> Decisions:
    margin = torch.full((len(pixels),), float("inf"))
    sharing = torch.zeros(len(pixels), dtype=torch.int64)
    with _recorded(classifier) as seen:
        classifier(pixels)
    for r, scores in seen:
        best, partner = scores.max(-1)
        ranked = best.sort(-1, descending=True)
        if r < scores.shape[1]:
            margin = torch.minimum(margin, ranked.values[:, r - 1] - ranked.values[:, r])
        if scores.shape[2] > 1:
            two = scores.topk(2, -1).values
            gap = (two[..., 0] - two[..., 1]).gather(1, ranked.indices[:, :r])
            margin = torch.minimum(margin, gap.min(1).values)
        chosen = partner.gather(1, ranked.indices[:, :r]).sort(1).values
        sharing += (chosen[:, 1:] == chosen[:, :-1]).sum(1)
    return Decisions(margin, sharing)


def parity_pixels(
    classifier: ServedClassifier, candidates: Tensor, n_images: int, found: Decisions | None = None
) -> Tensor:
    """Pick the first images that are clear in every decision and share destinations. Shapes: uint8 (n, H, W, 3)

    found: the candidates' decisions, where they are known already.
    Raises: ParityError where the candidates do not hold enough of them.
    """
    found = found or decisions(classifier, candidates)
    is_fit = found.margin >= MIN_MARGIN
    if any(classifier.model.schedule):
        is_fit &= found.sharing > 0
    chosen = candidates[is_fit][:n_images]
    if len(chosen) < n_images:
        raise ParityError(
            f"only {len(chosen)} of {len(candidates)} images are decided by {MIN_MARGIN} or more with shared "
            f"destinations under schedule {list(classifier.model.schedule)}; {n_images} are needed"
        )
    return chosen


def golden_pixels(
    classifiers: Sequence[ServedClassifier],
    decided: Sequence[Decisions],
    candidates: Tensor,
    further: Iterable[Tensor],
    n_images: int,
) -> Tensor:
    """Pick images that every graph decides clearly, so that another host's rounding changes no decision.

    The clearest of the candidates, whose decisions are known; where they are too few, the first of further images.
    Shapes: candidates and each of further uint8 (n, H, W, 3)
    Raises: ParityError where there are not enough.
    """
    margin = torch.stack([found.margin for found in decided]).amin(0)
    clearest = margin.argsort(descending=True)[:n_images]
    golden, n_seen = candidates[clearest[margin[clearest] >= MIN_MARGIN]], len(candidates)
    more = iter(further)
    while len(golden) < n_images and (pixels := next(more, None)) is not None:
        n_seen += len(pixels)
        for classifier in classifiers:  # each leaves fewer to the next
            pixels = pixels[decisions(classifier, pixels).margin >= MIN_MARGIN]
        golden = torch.cat([golden, pixels])[:n_images]
    if len(golden) < n_images:
        raise ParityError(
            f"only {len(golden)} of {n_seen} images are decided by {MIN_MARGIN} or more in every graph; "
            f"{n_images} are needed"
        )
    return golden


@torch.no_grad()
def largest_difference(
    classifier: ServedClassifier,
    exported: Callable[[Tensor], Tensor],
    pixels: Tensor,
    batches: tuple[int, ...] = BATCHES,
) -> float:
    """Return the largest |difference| of logits between eager and the exported graph, at each batch size.

    Shapes: pixels uint8 (n, H, W, 3), n >= the largest batch
    """
    largest = 0.0
    for n_images in batches:
        batch = pixels[:n_images]
        eager, found = classifier(batch), exported(batch)
        if found.shape != eager.shape or found.dtype != eager.dtype or not bool(found.isfinite().all()):
            raise ParityError(f"batch {n_images}: {found.dtype} {tuple(found.shape)}, not finite {tuple(eager.shape)}")
        largest = max(largest, float((found - eager).abs().max()))
    return largest
