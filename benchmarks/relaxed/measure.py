"""Training steps and groupings, interleaved, with their peak memory."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import CLOCKS, paired_ratio, time_interleaved
from training.merging.relaxed import EPSILON, Relaxation, soft_grouping
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.relaxed import RelaxedVisionTransformer
from training.models.vit import load_vit

REFERENCE = {"img_size": 112, "patch_size": 8, "embed_dim": 128, "num_heads": 2, "num_classes": 10}
FORWARD, BOTH = "plain forward", "plain forward and backward"


@dataclass(frozen=True)
class Cost:
    """One step, medians over rounds. Units: seconds; peak bytes besides weights and images; ratios within rounds."""

    step: str
    seconds: float
    peak_bytes: int
    to_forward: float
    to_both: float


@dataclass(frozen=True)
class Grouping:
    """The grouping, forward and backward, and the formula under autograd. Units: seconds, bytes."""

    r: int
    seconds: float
    plain_seconds: float
    speed_up: float
    peak_bytes: int
    plain_peak_bytes: int


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: ValueError if the grouping differs from its formula."""
    torch.set_num_threads(options.threads)
    names = ("architecture", "dim", "batch_size", "precision", "device", "threads", "clock", "rounds")
    about = {name: getattr(options, name) for name in names}
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    costs, grouping = measure_steps(options), measure_grouping(options)
    return {"about": about, "steps": [asdict(c) for c in costs], "grouping": [asdict(g) for g in grouping]}


def plain_grouping(scores: Tensor, r: int, relaxation: Relaxation) -> Tensor:
    """Group by the formula: r times a softmax over all kept entries of an image, differentiated by autograd.

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


def grouping_step(group: Callable[[Tensor], Tensor], scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares and the gradient of their weighted sum. Shapes: scores and weights (B, |A|, |B|)"""
    leaf = scores.detach().requires_grad_()
    share = group(leaf)
    (gradient,) = torch.autograd.grad(share, leaf, weights)
    return share.detach(), gradient


def distinct_weights(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel(), device=like.device, dtype=like.dtype).view_as(like)


def check_same(scores: Tensor, r: int) -> None:
    """Compare the grouping and its gradients with the formula in float64. Raises: ValueError if they differ."""
    exact = scores.double()
    weights = distinct_weights(exact)
    fast = grouping_step(lambda s: soft_grouping(s, r), exact, weights)
    plain = grouping_step(lambda s: plain_grouping(s, r, Relaxation()), exact, weights)
    for what, found, expected in zip(("shares", "gradients"), fast, plain, strict=True):
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference < 1e-8:
            raise ValueError(f"r = {r}: {what} of the grouping differ from the formula by {difference:.1e}")


class Steps:
    """Training steps of one ViT on the same images."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.is_half = options.device, options.precision == "bfloat16"
        self.vit = load_vit(options.architecture, **options.arguments).to(self.device).train()
        model: Any = self.vit
        config = EmbeddingConfig(depth=len(model.blocks), width=int(model.embed_dim), dim=options.dim, r=16)
        self.embedding = DecoupledEmbedding(config).to(self.device)
        height, width = model.patch_embed.img_size
        self.images = torch.randn(options.batch_size, 3, height, width, device=self.device)
        self.labels = torch.arange(options.batch_size, device=self.device) % model.num_classes

    def forward(self) -> None:
        with torch.no_grad(), self._autocast():
            self.vit(self.images)

    def both(self) -> None:
        """Forward and backward to all weights of the ViT."""
        self._learn(self.vit, self.vit)

    def relaxed(self, r: int, keep_tail: bool) -> None:
        """Forward and backward to the embedding of a frozen ViT: a step of modular training."""
        model = RelaxedVisionTransformer(self.vit, r, metric=self.embedding, keep_tail=keep_tail, exhausted="reduce")
        self._learn(model, self.embedding)

    def _learn(self, model: nn.Module, learner: nn.Module) -> None:
        self.vit.requires_grad_(learner is self.vit)
        with self._autocast():
            loss = functional.cross_entropy(model(self.images).float(), self.labels)
        torch.autograd.grad(loss, list(learner.parameters()))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.is_half)


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return the peak memory that a step adds."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    result: Any = profile.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure_steps(options: argparse.Namespace) -> list[Cost]:
    steps = Steps(options)
    runs: dict[str, Callable[[], None]] = {FORWARD: steps.forward, BOTH: steps.both}
    for r in options.rates:
        for keep_tail in (True, False):
            name = f"relaxed r={r}, {'tail kept' if keep_tail else 'no tail'}"
            runs[name] = functools.partial(steps.relaxed, r, keep_tail)
    clock = _clock(options)
    seconds = time_interleaved(runs, options.rounds, clock, "steps")
    return [
        Cost(
            step=name,
            seconds=statistics.median(seconds[name]),
            peak_bytes=peak_bytes(run, options.device),
            to_forward=paired_ratio(seconds[name], seconds[FORWARD]).median,
            to_both=paired_ratio(seconds[name], seconds[BOTH]).median,
        )
        for name, run in runs.items()
    ]


def measure_grouping(options: argparse.Namespace) -> list[Grouping]:
    """Time the grouping of the scores of one block. Raises: ValueError if it differs from the formula."""
    n_a = options.n_tokens // 2
    drawn = torch.randn(options.batch_size, n_a, n_a, generator=torch.Generator().manual_seed(0))
    scores = drawn.tanh().to(options.device)
    weights = distinct_weights(scores)
    rows = []
    for r in options.rates:
        check_same(scores[:2], r)
        groupings: dict[str, Callable[[Tensor], Tensor]] = {
            "fast": functools.partial(soft_grouping, r=r),
            "plain": functools.partial(plain_grouping, r=r, relaxation=Relaxation()),
        }
        runs = {name: functools.partial(grouping_step, group, scores, weights) for name, group in groupings.items()}
        seconds = time_interleaved(runs, options.rounds, _clock(options), f"grouping r={r}")
        rows.append(
            Grouping(
                r=r,
                seconds=statistics.median(seconds["fast"]),
                plain_seconds=statistics.median(seconds["plain"]),
                speed_up=paired_ratio(seconds["plain"], seconds["fast"]).median,
                peak_bytes=peak_bytes(runs["fast"], options.device),
                plain_peak_bytes=peak_bytes(runs["plain"], options.device),
            )
        )
    return rows


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    if options.device == "cuda":
        return _synchronised_clock
    return CLOCKS[options.clock]


def _synchronised_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
