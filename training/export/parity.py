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
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.classifier import AdaptiveClassifier, FrozenClassifier, ServedClassifier

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
def _recorded(model: Any, name: str, record: Callable[..., None]) -> Iterator[None]:
    """Show what a model's method decides by to `record`, while the model runs."""
    method = getattr(model, name)

    def recording(*arguments: Any) -> Matching:
        record(*arguments)
        return method(*arguments)  # type: ignore[no-any-return]

    setattr(model, name, recording)
    try:
        yield
    finally:
        delattr(model, name)


@torch.no_grad()
def decisions(classifier: FrozenClassifier, pixels: Tensor) -> Decisions:
    """Measure the smallest gap between what was chosen and the next best, over all blocks, for each image.

    Of a model that adapts also the smallest gap between a score and the threshold.
    """
    decide = _adaptive_decisions if isinstance(classifier, AdaptiveClassifier) else _fixed_decisions
    parts = [decide(classifier, part) for part in torch.split(pixels, _BATCH)]  # type: ignore[arg-type]
    return Decisions(torch.cat([part.margin for part in parts]), torch.cat([part.sharing for part in parts]))


def _fixed_decisions(classifier: ServedClassifier, pixels: Tensor) -> Decisions:
    margin = torch.full((len(pixels),), float("inf"))
    sharing = torch.zeros(len(pixels), dtype=torch.int64)
    seen: list[tuple[int, Tensor]] = []
    model = classifier.model

    def record(metric: Tensor, r: int) -> None:
        seen.append((r, cosine_scores(metric, model.n_protected)))

    with _recorded(model, "decide", record):
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


def _adaptive_decisions(classifier: AdaptiveClassifier, pixels: Tensor) -> Decisions:
    margin = torch.full((len(pixels),), float("inf"))
    sharing = torch.zeros(len(pixels), dtype=torch.int64)
    seen: list[tuple[float, Tensor]] = []
    model = classifier.model
    limits = model.thresholds.per_block(len(model.vit.blocks))

    def record(block: int, metric: Tensor, size: Tensor) -> None:
        seen.append((limits[block], model.candidates(block, metric, size).scores))

    with _recorded(model, "decide_similar", record):
        classifier(pixels)
    for threshold, scores in seen:
        best, partner = scores.max(-1)  # -inf where a token is absent: no gap is wider
        margin = torch.minimum(margin, (best - threshold).abs().min(1).values)
        merges = best > threshold
        if scores.shape[2] > 1:
            two = scores.topk(2, -1).values
            gap = torch.where(merges, two[..., 0] - two[..., 1], torch.inf)
            margin = torch.minimum(margin, gap.min(1).values)
        taken = torch.zeros_like(scores[:, 0], dtype=torch.int64).scatter_add(1, partner, merges.long())
        sharing += (taken - 1).clamp_min(0).sum(1)
    return Decisions(margin, sharing)


def parity_pixels(
    classifier: FrozenClassifier, pixels: Tensor, n_images: int, found: Decisions | None = None
) -> Tensor:
    """Pick images that are clear in every decision and share destinations. Shapes: uint8 (n, H, W, 3)

    The first ones; for a model that adapts the dearest, then the cheapest, and so in turn.
    found: the decisions on the pixels, where they are known already.
    Raises: ParityError where the candidates do not hold enough of them.
    """
    found = found or decisions(classifier, pixels)
    is_fit = found.margin >= MIN_MARGIN
    if isinstance(classifier, AdaptiveClassifier):
        chosen = _extremes(classifier, pixels[is_fit & (found.sharing > 0)], n_images)
    else:
        if any(classifier.model.schedule):
            is_fit &= found.sharing > 0
        chosen = pixels[is_fit][:n_images]
    if len(chosen) < n_images:
        raise ParityError(
            f"only {len(chosen)} of {len(pixels)} images are decided by {MIN_MARGIN} or more with shared "
            f"destinations under {_merging(classifier)}; {n_images} are needed"
        )
    return chosen


@torch.no_grad()
def _extremes(classifier: AdaptiveClassifier, pixels: Tensor, n_images: int) -> Tensor:
    """Return the dearest image, the cheapest, the next dearest, and so on."""
    if not len(pixels):
        return pixels
    falling = torch.cat([classifier(part)[2] for part in torch.split(pixels, _BATCH)]).argsort(descending=True)
    in_turn = torch.stack([falling, falling.flip(0)], dim=1).flatten()[: len(falling)]
    return pixels[in_turn][:n_images]


def _merging(classifier: FrozenClassifier) -> str:
    model = classifier.model
    return str(model.thresholds) if isinstance(model, AdaptiveVisionTransformer) else f"schedule {list(model.schedule)}"


def golden_pixels(
    classifiers: Sequence[FrozenClassifier],
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
    classifier: FrozenClassifier,
    exported: Callable[[Tensor], Any],
    pixels: Tensor,
    batches: tuple[int, ...] = BATCHES,
) -> float:
    """Return the largest |difference| of logits between eager and the exported graph, at each batch size.

    Shapes: pixels uint8 (n, H, W, 3), n >= the largest batch
    Raises: ParityError also where the graph of a model that adapts tells other tokens or GMACs of an image.
    """
    largest = 0.0
    for n_images in batches:
        batch = pixels[:n_images]
        eager, found = _parts(classifier(batch)), _parts(exported(batch))
        if [(part.dtype, part.shape) for part in found] != [(part.dtype, part.shape) for part in eager]:
            shapes = [f"{part.dtype} {tuple(part.shape)}" for part in (*found, *eager)]
            raise ParityError(
                f"batch {n_images}: {', '.join(shapes[: len(found)])}, not {', '.join(shapes[len(found) :])}"
            )
        if not all(bool(part.isfinite().all()) for part in found):
            raise ParityError(f"batch {n_images}: not all of it is finite")
        for name, one, other in zip(("tokens", "gmacs"), eager[1:], found[1:], strict=False):
            if not torch.allclose(one, other, rtol=1e-6, atol=0):
                raise ParityError(f"batch {n_images}: {name} {other.tolist()}, not {one.tolist()}")
        largest = max(largest, float((found[0] - eager[0]).abs().max()))
    return largest


def _parts(answer: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
