"""Calibration: the thresholds with the fewest GMACs whose paired accuracy loss stays inside a bound.

Thresholds are judged on the same images as the unmerged model, image by image. They are inside the bound where the
95 % interval of the loss ends inside it, give or take what so many images can resolve: the end of the interval where
no answer at all has changed. The search is SciPy's differential evolution over alpha, beta, floor and split depth;
each trial meets more and more of the images, until it is plain that it is outside the bound or dearer than the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import differential_evolution
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.evaluate.paired import PairedCounts, count_pairs
from training.merging.adaptive import Score, Thresholds
from training.models.calibration import AdaptiveMetric, Measured, adaptive_model
from training.models.classifier import AdaptiveClassifier
from training.models.embedding import DecoupledEmbedding

_FIRST_IMAGES = 128  # a trial meets so many, then twice as many, and so on
_BATCH = 16
_POPULATION = 5  # for each of the four numbers
_START = (3.0, -4.0, 0.0)  # 1 - alpha = 1e-3, flat: merges little
# Decades, but for the last: 1 - alpha, beta, and how much wider 1 - floor is than 1 - alpha.
_BOUNDS = ((0.0, 4.0), (-4.0, -0.5), (0.0, 2.0))


@dataclass(frozen=True)
class Trial:
    """Thresholds, and what they did on the first n_images: GMACs of one image, which answers changed for the worse."""

    thresholds: Thresholds
    gmacs: float
    counts: PairedCounts
    is_inside: bool

    @property
    def n_images(self) -> int:
        return self.counts.n_images

    @property
    def loss_points(self) -> float:
        return 100 * -self.counts.difference + 0.0  # not -0.0


class Judge:
    """A ViT, images, and what the unmerged ViT answers on them.

    Shapes: pixels uint8 (n, H, W, 3); labels (n,), or None: right is then to answer as the unmerged ViT does.
    n_parallel: batches at a time, of one thread each; more than one on a CPU only.
    """

    def __init__(
        self,
        vit: nn.Module,
        rule: InputRule,
        metric: AdaptiveMetric,
        embedding: DecoupledEmbedding | None,
        pixels: Tensor,
        labels: Tensor | None,
        *,
        device: str = "cpu",
        n_parallel: int = 1,
    ) -> None:
        self._vit, self._rule, self._metric, self._embedding = vit, rule, metric, embedding
        self._pixels, self._device, self._n_parallel = pixels, torch.device(device), n_parallel
        self.depth = len(vit.blocks)  # type: ignore[arg-type]
        self.is_labelled = labels is not None
        self._like = np.arange(len(pixels))
        never = Thresholds(2.0, 0.0, 2.0, self.depth)
        answers, gmacs = self._answer(never, 0, len(pixels))
        self.unmerged_gmacs = float(gmacs[0])
        self._labels = answers if labels is None else labels.numpy()
        self._base = answers == self._labels
        # Images that keep as many tokens side by side waste no rows on one another: order them by a look at each.
        self._like = np.argsort(self._answer(thresholds(_START, self.depth, "similarity"), 0, len(pixels))[1])

    def __len__(self) -> int:
        return len(self._pixels)

    def judge(self, found: Thresholds, first: int, last: int) -> tuple[PairedCounts, NDArray[np.float64]]:
        """Return the paired counts on images first … last - 1, and the GMACs of each."""
        answers, gmacs = self._answer(found, first, last)
        return count_pairs(self._base[first:last], answers == self._labels[first:last]), gmacs

    def measured(self, found: Thresholds, dataset: str, split: str) -> Measured:
        """Say what thresholds do on all of the images."""
        counts, gmacs = self.judge(found, 0, len(self))
        low, high = counts.interval()
        return Measured(
            dataset=dataset,
            split=split,
            n_images=len(self),
            is_labelled=self.is_labelled,
            unmerged_gmacs=self.unmerged_gmacs,
            gmacs=float(gmacs.mean()),
            difference_points=100 * counts.difference,
            ci95_points=(100 * low, 100 * high),
        )

    def _answer(self, found: Thresholds, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the answer to each image, and its GMACs."""
        model = adaptive_model(self._vit, found, self._metric, self._embedding)
        classifier = AdaptiveClassifier(model, self._rule).eval().to(self._device)
        chosen = self._like[(self._like >= first) & (self._like < last)]
        batches = [chosen[begin : begin + _BATCH] for begin in range(0, len(chosen), _BATCH)]

        @torch.inference_mode()
        def run(batch: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            logits, _, gmacs = classifier(self._pixels[batch].to(self._device))
            return logits.argmax(1).cpu(), gmacs.cpu()

        with ThreadPoolExecutor(self._n_parallel) as pool:
            parts = list(pool.map(run, batches))
        answers, gmacs = np.empty(last - first, np.int64), np.empty(last - first)
        answers[chosen - first] = torch.cat([answer for answer, _ in parts]).numpy()
        gmacs[chosen - first] = torch.cat([cost for _, cost in parts]).double().numpy()
        return answers, gmacs


def thresholds(x: Sequence[float], depth: int, score: Score) -> Thresholds:
    """Return the thresholds that a point of the search stands for; without a fourth number no split by size."""
    width = 10 ** -x[0]
    return Thresholds(
        alpha=1 - width,
        beta=10 ** x[1],
        floor=max(-1.0, 1 - width * 10 ** x[2]),
        split_depth=round(x[3]) if len(x) > 3 else depth,
        score=score,
    )


def resolution_points(n_images: int) -> float:
    """Return how much loss so many images cannot rule out even where no answer has changed."""
    return -100 * PairedCounts(n_images, 0, 0, 0).interval()[0]


def is_inside(counts: PairedCounts, max_accuracy_drop: float) -> bool:
    """Say whether the interval of the loss ends inside the bound, give or take the resolution. Units: points"""
    return -100 * counts.interval()[0] <= max_accuracy_drop + resolution_points(counts.n_images) + 1e-9


def _is_hopeless(counts: PairedCounts, max_accuracy_drop: float) -> bool:
    return -100 * counts.interval()[1] > max_accuracy_drop


def attempt(judge: Judge, found: Thresholds, max_accuracy_drop: float, best_gmacs: float = math.inf) -> Trial:
    """Try thresholds on more and more images: all of them, unless they are hopeless or dearer than the best."""
    first, last, counts, gmacs = 0, 0, None, np.empty(0)
    while last < len(judge):
        first, last = last, min(max(_FIRST_IMAGES, 2 * last), len(judge))
        more, cost = judge.judge(found, first, last)
        counts, gmacs = more if counts is None else _sum(counts, more), np.concatenate([gmacs, cost])
        margin = 3 * gmacs.std() / math.sqrt(len(gmacs))
        if _is_hopeless(counts, max_accuracy_drop) or gmacs.mean() - margin > best_gmacs:
            break
    if counts is None:
        raise ValueError("no images to calibrate on")
    return Trial(found, float(gmacs.mean()), counts, is_inside(counts, max_accuracy_drop))


def _sum(one: PairedCounts, other: PairedCounts) -> PairedCounts:
    return PairedCounts(*(a + b for a, b in zip(asdict(one).values(), asdict(other).values(), strict=True)))


def search(
    judge: Judge,
    max_accuracy_drop: float,
    *,
    n_trials: int,
    seed: int,
    score: Score = "similarity",
    known: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
    """Return the cheapest thresholds inside the bound.

    known: the trials that an interrupted search had made, in their order; they are not made again.
    Raises: ValueError where none is inside the bound.
    """
    remembered: Iterator[Trial] = iter(known)
    best: Trial | None = None

    def objective(x: NDArray[np.float64]) -> float:
        nonlocal best
        found = thresholds(x.tolist(), judge.depth, score)
        trial = next(remembered, None)
        if trial is None or trial.thresholds != found:
            trial = attempt(judge, found, max_accuracy_drop, best.gmacs if best else math.inf)
            on_trial(trial)
        is_complete = trial.n_images == len(judge)
        if trial.is_inside and is_complete and (best is None or trial.gmacs < best.gmacs):
            best = trial
        if trial.is_inside:
            return trial.gmacs / judge.unmerged_gmacs
        return 1 - trial.counts.interval()[0]  # dearer than any that is inside, and the more so the more it loses

    generations = max(0, math.ceil(n_trials / (4 * _POPULATION)) - 1)
    differential_evolution(
        objective,
        [*_BOUNDS, (0, judge.depth)],
        integrality=[False, False, False, True],
        x0=[*_START, judge.depth],
        popsize=_POPULATION,
        maxiter=generations,
        tol=0,
        polish=False,
        rng=seed,
    )
    if best is None:
        raise ValueError(
            f"max_accuracy_drop {max_accuracy_drop}: no thresholds of {n_trials} trials lose as little on "
            f"{len(judge)} images; allow a larger drop, more images or more trials"
        )
    return best


def write_trial(trial: Trial, file: Path) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(trial)) + "\n")


def read_trials(file: Path) -> list[Trial]:
    """Read what `write_trial` wrote; a last line that an interruption cut short is left out."""
    trials = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            break
        if "thresholds" in entry:
            parts = {"thresholds": Thresholds(**entry["thresholds"]), "counts": PairedCounts(**entry["counts"])}
            trials.append(Trial(**{**entry, **parts}))
    return trials
