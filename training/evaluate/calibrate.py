"""Calibration: the thresholds with the fewest GMACs whose paired accuracy loss stays inside a bound.

Thresholds are judged on the same images as the unmerged model, image by image. They are inside the bound where the
95 % interval of the loss ends inside it, give or take what so many images can resolve: the end of the interval where
no answer at all has changed. The search is SciPy's differential evolution over alpha, beta, floor and split depth.
Each trial meets more and more of the images, those first that the unmerged model was least sure of, until it is plain
that it is outside the bound or dearer than the best: most trials see a few of the images, and only the best see all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
    """Thresholds, and what they did on the images they met.

    gmacs: of one image, the mean over all images; where not all were met, judged by the best trial on the same ones.
    """

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


Costs: TypeAlias = NDArray[np.float64]


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
        self._device, self._n_parallel = torch.device(device), n_parallel
        self.depth = len(vit.blocks)  # type: ignore[arg-type]
        self.is_labelled = labels is not None
        self._pixels, self._like = pixels, np.arange(len(pixels))
        logits, gmacs = self._run(Thresholds(2.0, 0.0, 2.0, self.depth), 0, len(pixels))
        self.unmerged_gmacs = float(gmacs[0])
        two = np.sort(logits, axis=1)[:, -2:]
        order = np.argsort(two[:, 1] - two[:, 0], kind="stable")  # the least sure first: they tell soonest
        self._pixels = pixels[order]
        answers = logits.argmax(1)
        self._labels = (answers if labels is None else labels.numpy())[order]
        self.is_right = answers[order] == self._labels
        # Images that keep as many tokens side by side waste no rows on one another: order them by a look at each.
        self._like = np.argsort(self._run(thresholds(_START, self.depth, "similarity"), 0, len(pixels))[1])

    def __len__(self) -> int:
        return len(self._pixels)

    def judge(self, found: Thresholds, first: int, last: int) -> tuple[NDArray[np.bool_], Costs]:
        """Return which of images first … last - 1 are right, and the GMACs of each. Shapes: (last - first,) both"""
        logits, gmacs = self._run(found, first, last)
        return logits.argmax(1) == self._labels[first:last], gmacs

    def measured(self, found: Thresholds, dataset: str, split: str) -> Measured:
        """Say what thresholds do on all of the images."""
        is_right, gmacs = self.judge(found, 0, len(self))
        counts = count_pairs(self.is_right, is_right)
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

    def _run(self, found: Thresholds, first: int, last: int) -> tuple[NDArray[np.float32], Costs]:
        """Return the logits of each image, and its GMACs."""
        model = adaptive_model(self._vit, found, self._metric, self._embedding)
        classifier = AdaptiveClassifier(model, self._rule).eval().to(self._device)
        chosen = self._like[(self._like >= first) & (self._like < last)]
        batches = [chosen[begin : begin + _BATCH] for begin in range(0, len(chosen), _BATCH)]

        @torch.inference_mode()
        def run(batch: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            logits, _, gmacs = classifier(self._pixels[batch].to(self._device))
            return logits.cpu(), gmacs.cpu()

        with ThreadPoolExecutor(self._n_parallel) as pool:
            parts = list(pool.map(run, batches))
        back = np.argsort(chosen)
        return (
            torch.cat([logits for logits, _ in parts]).numpy()[back],
            torch.cat([cost for _, cost in parts]).double().numpy()[back],
        )


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


def _can_be_inside(counts: PairedCounts, max_accuracy_drop: float, n_images: int) -> bool:
    """Say whether they end inside the bound on all n_images if they lose nothing more and win as often as yet."""
    n_lost = counts.n_only_base
    n_won = min(counts.n_only_other * n_images // counts.n_images, n_images - n_lost)
    return is_inside(PairedCounts(n_images - n_lost - n_won, n_lost, n_won, 0), max_accuracy_drop)


def attempt(
    judge: Judge, found: Thresholds, max_accuracy_drop: float, best_costs: Costs | None = None
) -> tuple[Trial, Costs]:
    """Try thresholds on more and more images: all of them, unless they are hopeless or dearer than the best.

    Shapes: best_costs (n,), the GMACs of each image under the best thresholds yet; returned are those of the trial
    """
    is_right, costs = np.empty(0, bool), np.empty(0)
    while len(costs) < len(judge):
        first = len(costs)
        more_right, more_costs = judge.judge(found, first, min(max(_FIRST_IMAGES, 2 * first), len(judge)))
        is_right, costs = np.concatenate([is_right, more_right]), np.concatenate([costs, more_costs])
        counts = count_pairs(judge.is_right[: len(costs)], is_right)
        can_be_inside = _can_be_inside(counts, max_accuracy_drop, len(judge))
        if not can_be_inside or _is_dearer(costs, best_costs):
            break
    gmacs = float(costs.mean())
    if best_costs is not None:
        gmacs *= float(best_costs.mean() / best_costs[: len(costs)].mean())
    return Trial(found, gmacs, counts, can_be_inside), costs


def _is_dearer(costs: Costs, best_costs: Costs | None) -> bool:
    """Say whether the same images cost more, by more than three standard errors."""
    if best_costs is None:
        return False
    more = costs - best_costs[: len(costs)]
    return bool(more.mean() > 3 * more.std() / math.sqrt(len(more)))


def search(
    judge: Judge,
    max_accuracy_drop: float,
    *,
    n_trials: int,
    seed: int,
    score: Score = "similarity",
    split_depth: int | None = None,
    known: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
    """Return the cheapest thresholds inside the bound.

    split_depth: fixed, or None where it is searched too.
    known: the trials that an interrupted search had made, in their order; they are not made again.
    Raises: ValueError where none is inside the bound.
    """
    remembered: Iterator[Trial] = iter(known)
    best: Trial | None = None
    best_costs: Costs | None = None

    def objective(x: NDArray[np.float64]) -> float:
        nonlocal best, best_costs
        found = thresholds(x.tolist(), judge.depth, score)
        trial, costs = next(remembered, None), None
        if trial is None:
            trial, costs = attempt(judge, found, max_accuracy_drop, best_costs)
            on_trial(trial)
        is_complete = trial.n_images == len(judge)
        if trial.is_inside and is_complete and (best is None or trial.gmacs < best.gmacs):
            best, best_costs = trial, costs if costs is not None else judge.judge(found, 0, len(judge))[1]
        if trial.is_inside:
            return trial.gmacs / judge.unmerged_gmacs
        # Dearer than any that is inside, and the more so the more it loses; but what has won more than it lost, and may
        # owe that to luck, comes out cheaper: it draws the search on, and is never the result.
        return 1 + trial.loss_points * trial.n_images

    generations = max(0, math.ceil(n_trials / (4 * _POPULATION)) - 1)
    differential_evolution(
        objective,
        [*_BOUNDS, (0, judge.depth) if split_depth is None else (split_depth, split_depth)],
        integrality=[False, False, False, True],
        x0=[*_START, judge.depth if split_depth is None else split_depth],
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
