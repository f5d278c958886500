"""Parity: a graph must compute the same as eager PyTorch, decision by decision.

Merging compares floating-point scores. Where two scores are closer than rounding errors, two
correct implementations may merge different pairs, and the results differ although neither is wrong.
So the graph gives out its scores, and eager decides by them. Then both must agree in every score
and every result, of any image. Scores that agree up to rounding make each difference of decisions
a near tie. Ties are compared on rounded scores, which eager and the graph are both given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from training.export.formats import Exported, GraphFormat
from training.export.scores import n_decisions, steered
from training.merging.adaptive import AdaptiveMatching
from training.merging.matching import BipartiteMatching, Matching
from training.models.activations import images_at_once
from training.models.frozen import FrozenModule
from training.tasks import graph_outputs
from training.tasks.task import GMACS, output_tensors

MIN_MARGIN = 3e-6
"""Fifty roundings of float32. The median margin over images of a trained model is 2e-6."""
_N_UNCLEAR = 2
"""Images that each graph leaves to the next where fewer are clear."""
_N_ROUNDINGS = 4
_TIE_STEPS = 64
"""Scores are rounded to multiples of 1/64, so that many are equal."""


class ParityError(RuntimeError):
    """An exported graph differs from eager by more than the tolerance, or could not be tested."""


@dataclass(frozen=True)
class Parity:
    """How closely a graph follows eager.

    difference: of results, the largest. noise: of scores, the largest. n_images: compared.
        n_near_ties: images in which eager alone decides otherwise, by scores within the noise.
    """

    difference: float
    noise: float = 0.0
    n_images: int = 0
    n_near_ties: int = 0


@torch.no_grad()
def check_parity(
    module: FrozenModule, graph_format: GraphFormat, file: Path, exported: Exported, pixels: Tensor, tolerance: float
) -> Parity:
    """Compare a graph file with eager, at batches of 1, of 2, and of as many as fit into memory.

    exported: the file as `graph_format` loads it.
    Shapes: pixels uint8 (n, H, W, 3), n >= 2
    Raises: ParityError naming the file, the batch, what differs and by how much.
    """
    show = graph_format.show and graph_format.show(module, pixels[:2], file)
    largest = images_at_once(module.model.vit, len(pixels))
    found: list[Parity] = []
    for batch in (pixels[:1], pixels[:2], *pixels.split(largest)):  # type: ignore[no-untyped-call]
        what = f"{file.name}: batch {len(batch)}"
        if show is None:
            eager = output_tensors(module(batch))
            found.append(_compared(module, eager, output_tensors(exported(batch)), what, tolerance))
            continue
        shown = show(batch)
        found.append(_followed(module, shown, batch, what, tolerance))
        # The graph as published, without the scores as outputs, makes the same decisions.
        outputs = shown[: len(graph_outputs(module))]
        _compared(module, outputs, output_tensors(exported(batch)), f"{what}, without scores", tolerance)
    if graph_format.feed is not None and n_decisions(module):
        _check_ties(module, graph_format.feed(file), pixels[:2], f"{file.name}: equal scores", tolerance)
    return Parity(
        max(one.difference for one in found),
        max(one.noise for one in found),
        sum(one.n_images for one in found[2:]),
        sum(one.n_near_ties for one in found[2:]),
    )


def _followed(module: FrozenModule, shown: Sequence[Tensor], pixels: Tensor, what: str, tolerance: float) -> Parity:
    """Run eager by the graph's scores, and compare its own scores and results with the graph's."""
    n_outputs = len(graph_outputs(module))
    remaining, noise = iter(shown[n_outputs:]), 0.0
    is_otherwise = torch.zeros(len(pixels), dtype=torch.bool)

    def follow(own: Tensor, match: Callable[[Tensor], Matching]) -> Tensor:
        nonlocal noise, is_otherwise
        scores = next(remaining)
        noise = max(noise, _score_difference(own, scores, what, tolerance))
        is_otherwise |= _differ(match(own), match(scores))
        return scores

    with steered(module, follow):
        eager = output_tensors(module(pixels))
    compared = _compared(module, eager, shown[:n_outputs], what, tolerance)
    return replace(compared, noise=noise, n_near_ties=int(is_otherwise.sum()))


def _check_ties(
    module: FrozenModule,
    fed: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]],
    pixels: Tensor,
    what: str,
    tolerance: float,
) -> None:
    """Let eager and the graph decide by the same scores, of which many are equal."""
    rounded: list[Tensor] = []

    def rounding(own: Tensor, _: Any) -> Tensor:
        rounded.append((own * _TIE_STEPS).round() / _TIE_STEPS)
        return rounded[-1]

    with steered(module, rounding):
        eager = output_tensors(module(pixels))
    n_outputs = len(graph_outputs(module))
    _compared(module, eager, fed(pixels, rounded)[:n_outputs], what, tolerance)


def _score_difference(own: Tensor, scores: Tensor, what: str, tolerance: float) -> float:
    """Return the largest difference of scores. Raises: ParityError past the tolerance."""
    if own.shape != scores.shape or not torch.equal(own.isinf(), scores.isinf()):
        raise ParityError(f"{what}: scores {tuple(scores.shape)} of other tokens than eager's {tuple(own.shape)}")
    # Absent tokens score -inf in both.
    difference = float(torch.where(own.isinf(), 0.0, (own - scores).abs()).max())
    # Written so that NaN fails too.
    if not difference <= tolerance:
        raise ParityError(f"{what}: scores differ from eager by {difference:.2e} > {tolerance:.0e}")
    return difference


def _differ(one: Matching, other: Matching) -> Tensor:
    """Return in which images two matchings differ. Shapes: (B,)"""
    if isinstance(one, AdaptiveMatching) and isinstance(other, AdaptiveMatching):
        return (one.joins != other.joins).flatten(1).any(1)
    parts = cast(BipartiteMatching, one), cast(BipartiteMatching, other)
    return (parts[0].row != parts[1].row).any(1) | (parts[0].joins != parts[1].joins).flatten(1).any(1)


def _compared(
    module: FrozenModule, eager: Sequence[Tensor], found: Sequence[Tensor], what: str, tolerance: float
) -> Parity:
    """Compare outputs.

    Raises: ParityError for other shapes or types, results that are not finite or differ by more
        than the tolerance, and exact outputs that differ.
    """
    if [(part.dtype, part.shape) for part in found] != [(part.dtype, part.shape) for part in eager]:
        kinds, expected = (", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts) for parts in (found, eager))
        raise ParityError(f"{what}: {kinds}, not {expected}")
    difference = 0.0
    for output, one, other in zip(graph_outputs(module), eager, found, strict=True):
        if not bool(other.isfinite().all()):
            raise ParityError(f"{what}: some {output.name} are not finite")
        if not output.is_exact:
            difference = max(difference, float((other - one).abs().max()))
        elif not torch.allclose(one, other, rtol=1e-6, atol=0):
            raise ParityError(f"{what}: {output.name} {other.tolist()}, not {one.tolist()}")
    if difference > tolerance:
        raise ParityError(f"{what}: differs from eager by {difference:.2e} > {tolerance:.0e}")
    return Parity(difference, n_images=len(eager[0]))


@torch.no_grad()
def margins(module: FrozenModule, pixels: Tensor) -> Tensor:
    """Return each image's smallest margin between a chosen score and the next best.

    For an adaptive model, differences between scores and the threshold count too.
    Shapes: uint8 (n, H, W, 3) -> (n,)
    """
    parts = pixels.split(images_at_once(module.model.vit, len(pixels)))  # type: ignore[no-untyped-call]
    return torch.cat([_margins(module, part) for part in parts])


def _margins(module: FrozenModule, pixels: Tensor) -> Tensor:
    smallest = torch.full((len(pixels),), torch.inf)
    model: Any = module.model
    # Per block that merges: r, or the threshold.
    limits = iter(
        [limit for limit in model.thresholds.per_block(len(model.vit.blocks)) if limit < 1]
        if module.is_adaptive
        else [r for r in model.schedule if r]
    )

    def look(scores: Tensor, _: Any) -> Tensor:
        nonlocal smallest
        of_block = _adaptive_margin if module.is_adaptive else _fixed_margin
        smallest = torch.minimum(smallest, of_block(scores, next(limits)))
        return scores

    with steered(module, look):
        module(pixels)
    return smallest


def _fixed_margin(scores: Tensor, r: int) -> Tensor:
    ranked = scores.amax(-1).sort(-1, descending=True)
    margin = torch.full((len(scores),), torch.inf)
    if r < scores.shape[1]:
        margin = ranked.values[:, r - 1] - ranked.values[:, r]
    if scores.shape[2] > 1:
        two = scores.topk(2, -1).values
        gap = (two[..., 0] - two[..., 1]).gather(1, ranked.indices[:, :r])
        margin = torch.minimum(margin, gap.min(1).values)
    return margin


def _adaptive_margin(scores: Tensor, threshold: float) -> Tensor:
    # Absent tokens score -inf, so their margins are infinite.
    best = scores.amax(-1)
    margin = (best - threshold).abs().min(1).values
    if scores.shape[2] > 1:
        two = scores.topk(2, -1).values
        gap = torch.where(best > threshold, two[..., 0] - two[..., 1], torch.inf)
        margin = torch.minimum(margin, gap.min(1).values)
    return margin


def varied(pixels: Tensor, n_images: int) -> Tensor:
    """Return n images: the given ones, then the same mirrored, shifted and with noise.

    Shapes: uint8 (n, H, W, 3)
    """
    noise = torch.Generator().manual_seed(0)
    parts = [pixels[:n_images]]
    while sum(map(len, parts)) < n_images:
        step = len(parts)
        moved = pixels.roll((3 * step, 5 * step), (1, 2))
        moved = moved.flip(2) if step % 2 else moved
        change = torch.randint(-2, 3, moved.shape, generator=noise, dtype=torch.int16)
        parts.append((moved.to(torch.int16) + change).clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)[:n_images]


@torch.no_grad()
def parity_pixels(module: FrozenModule, pixels: Tensor, n_images: int) -> Tensor:
    """Return images to compare: for an adaptive model, those with the most and the fewest GMACs alternate."""
    if not module.is_adaptive:
        return pixels[:n_images]
    gmacs = graph_outputs(module).index(GMACS)
    parts = pixels.split(images_at_once(module.model.vit, len(pixels)))  # type: ignore[no-untyped-call]
    falling = torch.cat([module(part)[gmacs] for part in parts]).argsort(descending=True)
    return pixels[torch.stack([falling, falling.flip(0)], dim=1).flatten()[:n_images]]


@torch.no_grad()
def rounding_spread(module: FrozenModule, exported: Exported, pixels: Tensor) -> float:
    """Return how far results move where near ties are decided otherwise: in the graph, and in eager."""
    generator = torch.Generator().manual_seed(0)

    def rounded(own: Tensor, _: Any) -> Tensor:
        return own + MIN_MARGIN * (2 * torch.rand(own.shape, generator=generator) - 1)

    eager, found = output_tensors(module(pixels))[0], [output_tensors(exported(pixels))[0]]
    for _ in range(_N_ROUNDINGS):
        with steered(module, rounded):
            found.append(output_tensors(module(pixels))[0])
    return max(float((other - eager).abs().max()) for other in found)


@dataclass(frozen=True)
class Golden:
    """Images for golden outputs. margin: the smallest of any of them in any graph"""

    pixels: Tensor
    margin: float

    @property
    def is_clear(self) -> bool:
        return self.margin >= MIN_MARGIN


def golden_images(modules: Sequence[FrozenModule], chunks: Iterable[Tensor], n_images: int) -> Golden:
    """Return images whose decisions are clear in every graph, so that other hosts make them too.

    Chunks are read until n images are clear. Where there are fewer, those are returned. Where none
    is, the clearest image is, alone: each unclear image is a risk that a host refuses the version.
    Shapes: each of chunks uint8 (n, H, W, 3)
    """
    clear: list[Tensor] = []
    smallest, best = torch.inf, Golden(torch.empty(0), -1.0)
    for chunk in chunks:
        pixels, margin = chunk, torch.full((len(chunk),), torch.inf)
        # The last graphs merge most, and leave the fewest images to the others.
        for module in reversed(modules):
            margin = torch.minimum(margin, margins(module, pixels))
            order = margin.argsort(descending=True)
            n_clear = int((margin >= MIN_MARGIN).sum())
            # Token counts of adaptive graphs are compared exactly, so those come first and are clear.
            n_kept = n_clear if module.is_adaptive and n_clear else max(n_clear, min(_N_UNCLEAR, len(order)))
            pixels, margin = pixels[order[:n_kept]], margin[order[:n_kept]]
        best = max(best, Golden(pixels[:1], float(margin[0])), key=lambda golden: golden.margin)
        is_clear = margin >= MIN_MARGIN
        clear += list(pixels[is_clear])
        smallest = min([smallest, *margin[is_clear].tolist()])
        if len(clear) >= n_images:
            break
    return Golden(torch.stack(clear[:n_images]), smallest) if clear else best
