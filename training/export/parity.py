"""Parity: a graph must compute the same as eager PyTorch, on inputs that exercise merging.

Merging compares floating-point scores. Where two scores are closer than rounding errors, two
correct implementations may merge different pairs, and the results differ although neither is wrong.
So parity uses images in which every decision has a margin of at least `MIN_MARGIN`, and in which
several tokens share a destination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from training.merging.matching import Matching, cosine_scores
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.frozen import FrozenModule
from training.tasks import graph_outputs
from training.tasks.task import GMACS, output_tensors

MIN_MARGIN = 3e-6
"""Fifty roundings of float32. The median margin over images of a trained model is 2e-6."""
BATCHES = (1, 2, 32)
_BATCH = 64


class ParityError(RuntimeError):
    """An exported graph differs from eager by more than the tolerance, or could not be tested."""


@dataclass(frozen=True)
class Decisions:
    """The margins of the merging decisions of each image.

    Shapes: margin (B,), the smallest difference of cosines; sharing (B,), tokens that share a
        destination
    """

    margin: Tensor
    sharing: Tensor


@contextmanager
def _recorded(model: Any, name: str, record: Callable[..., None]) -> Iterator[None]:
    """Pass the arguments of a model's method to `record` whenever it is called."""
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
def decisions(module: FrozenModule, pixels: Tensor) -> Decisions:
    """Measure each image's smallest margin between a chosen score and the next best.

    For an adaptive model, differences between scores and the threshold count too.
    """
    decide = _adaptive_decisions if module.is_adaptive else _fixed_decisions
    parts = [decide(module, part) for part in torch.split(pixels, _BATCH)]
    return Decisions(torch.cat([part.margin for part in parts]), torch.cat([part.sharing for part in parts]))


def _fixed_decisions(module: FrozenModule, pixels: Tensor) -> Decisions:
    margin = torch.full((len(pixels),), float("inf"))
    sharing = torch.zeros(len(pixels), dtype=torch.int64)
    seen: list[tuple[int, Tensor]] = []
    model = module.model

    def record(metric: Tensor, r: int) -> None:
        seen.append((r, cosine_scores(metric, model.n_protected)))

    with _recorded(model, "decide", record):
        module(pixels)
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


def _adaptive_decisions(module: FrozenModule, pixels: Tensor) -> Decisions:
    margin = torch.full((len(pixels),), float("inf"))
    sharing = torch.zeros(len(pixels), dtype=torch.int64)
    seen: list[tuple[float, Tensor]] = []
    model = cast(AdaptiveVisionTransformer, module.model)
    limits = model.thresholds.per_block(len(model.vit.blocks))

    def record(block: int, metric: Tensor, size: Tensor) -> None:
        seen.append((limits[block], model.candidates(block, metric, size).scores))

    with _recorded(model, "decide_similar", record):
        module(pixels)
    for threshold, scores in seen:
        # Absent tokens score -inf, so their margins are infinite.
        best, partner = scores.max(-1)
        margin = torch.minimum(margin, (best - threshold).abs().min(1).values)
        merges = best > threshold
        if scores.shape[2] > 1:
            two = scores.topk(2, -1).values
            gap = torch.where(merges, two[..., 0] - two[..., 1], torch.inf)
            margin = torch.minimum(margin, gap.min(1).values)
        taken = torch.zeros_like(scores[:, 0], dtype=torch.int64).scatter_add(1, partner, merges.long())
        sharing += (taken - 1).clamp_min(0).sum(1)
    return Decisions(margin, sharing)


def parity_pixels(module: FrozenModule, pixels: Tensor, n_images: int, found: Decisions | None = None) -> Tensor:
    """Return the first images with clear decisions and shared destinations.

    Shapes: uint8 (n, H, W, 3)

    For an adaptive model, the images with the most and with the fewest GMACs alternate.
    found: the decisions on the pixels, if they are already known.
    Raises: ParityError where too few images qualify.
    """
    found = found or decisions(module, pixels)
    is_fit = found.margin >= MIN_MARGIN
    if module.is_adaptive:
        chosen = _extremes(module, pixels[is_fit & (found.sharing > 0)], n_images)
    else:
        if any(module.model.schedule):
            is_fit &= found.sharing > 0
        chosen = pixels[is_fit][:n_images]
    if len(chosen) < n_images:
        raise ParityError(
            f"only {len(chosen)} of {len(pixels)} images have decision margins of at least {MIN_MARGIN} and shared "
            f"destinations under {_merging(module)}; {n_images} are needed"
        )
    return chosen


@torch.no_grad()
def _extremes(module: FrozenModule, pixels: Tensor, n_images: int) -> Tensor:
    """Return images with the most and the fewest GMACs, alternating."""
    if not len(pixels):
        return pixels
    gmacs = graph_outputs(module).index(GMACS)
    falling = torch.cat([module(part)[gmacs] for part in torch.split(pixels, _BATCH)]).argsort(descending=True)
    alternating = torch.stack([falling, falling.flip(0)], dim=1).flatten()[: len(falling)]
    return pixels[alternating][:n_images]


def _merging(module: FrozenModule) -> str:
    model = module.model
    return str(model.thresholds) if isinstance(model, AdaptiveVisionTransformer) else f"schedule {list(model.schedule)}"


def golden_pixels(
    modules: Sequence[FrozenModule],
    decided: Sequence[Decisions],
    candidates: Tensor,
    further: Iterable[Tensor],
    n_images: int,
) -> Tensor:
    """Return images whose decisions are clear in every graph, also on other hosts.

    They are the candidates with the largest margins. Where those are too few, the first further
    images that qualify follow.
    decided: the decisions on the candidates, by graph.
    Shapes: candidates and each of further uint8 (n, H, W, 3)
    Raises: ParityError where too few images qualify.
    """
    margin = torch.stack([found.margin for found in decided]).amin(0)
    clearest = margin.argsort(descending=True)[:n_images]
    golden, n_seen = candidates[clearest[margin[clearest] >= MIN_MARGIN]], len(candidates)
    more = iter(further)
    while len(golden) < n_images and (pixels := next(more, None)) is not None:
        n_seen += len(pixels)
        for module in modules:
            pixels = pixels[decisions(module, pixels).margin >= MIN_MARGIN]
        golden = torch.cat([golden, pixels])[:n_images]
    if len(golden) < n_images:
        raise ParityError(
            f"only {len(golden)} of {n_seen} images have decision margins of at least {MIN_MARGIN} in every graph; "
            f"{n_images} are needed"
        )
    return golden


@torch.no_grad()
def largest_difference(
    module: FrozenModule,
    exported: Callable[[Tensor], Any],
    pixels: Tensor,
    batches: tuple[int, ...] = BATCHES,
) -> float:
    """Return the largest difference of the result between eager and graph, over all batch sizes.

    Shapes: pixels uint8 (n, H, W, 3), n >= the largest batch
    Raises: ParityError for other shapes or types, values that are not finite, and exact outputs
        that differ.
    """
    largest = 0.0
    outputs = graph_outputs(module)
    for n_images in batches:
        batch = pixels[:n_images]
        eager, found = output_tensors(module(batch)), output_tensors(exported(batch))
        if [(part.dtype, part.shape) for part in found] != [(part.dtype, part.shape) for part in eager]:
            shapes = [f"{part.dtype} {tuple(part.shape)}" for part in (*found, *eager)]
            raise ParityError(
                f"batch {n_images}: {', '.join(shapes[: len(found)])}, not {', '.join(shapes[len(found) :])}"
            )
        if not all(bool(part.isfinite().all()) for part in found):
            raise ParityError(f"batch {n_images}: some values are not finite")
        for output, one, other in zip(outputs, eager, found, strict=True):
            if not output.is_exact:
                largest = max(largest, float((other - one).abs().max()))
            elif not torch.allclose(one, other, rtol=1e-6, atol=0):
                raise ParityError(f"batch {n_images}: {output.name} {other.tolist()}, not {one.tolist()}")
    return largest
