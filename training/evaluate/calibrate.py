"""Calibration: find the thresholds with the fewest GMACs within a bound on lost accuracy.

The loss is paired: each image is compared with the unmerged model's answer on the same image.
Thresholds are within the bound when the upper end of the loss's 95 % interval is, apart from the
resolution of the sample: the upper end of the interval when no answer has changed. The search is
SciPy's differential evolution over alpha, beta, floor and split depth. A trial runs on growing
parts of the images, beginning with those of which the unmerged model is least certain. It stops
once it is clearly outside the bound or more expensive than the best trial. So most trials use few
images, and only the best use all of them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
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
from training.models.activations import images_at_once
from training.models.calibration import Measured, adaptive_model
from training.models.classifier import AdaptiveClassifier
from training.models.embedding import DecoupledEmbedding

_FIRST_IMAGES = 128
"""Images in the first part of a trial. Each further part doubles the total."""
_BATCH = 16
"""At most: fewer where the model is large."""
_POPULATION = 5
"""Population of the search per parameter."""
_START = (3.0, -4.0, 0.0)
"""1 - alpha = 1e-3, nearly the same in each block: merges few tokens."""
# In decades: 1 - alpha, beta, and the ratio of 1 - floor to 1 - alpha. The fourth parameter, split
# depth, is a number.
_BOUNDS = ((0.0, 4.0), (-4.0, -0.5), (0.0, 2.0))


@dataclass(frozen=True)
class Trial:
    """Thresholds and their results on the images tried.

    gmacs: mean per image over all images. If the trial stopped early, it is extrapolated from the
        ratio to the best trial on the same images.
    """

    thresholds: Thresholds
    gmacs: float
    counts: PairedCounts
    is_within_bound: bool

    @property
    def n_images(self) -> int:
        return self.counts.n_images

    @property
    def loss_points(self) -> float:
        # + 0.0 turns -0.0 into 0.0.
        return 100 * -self.counts.difference + 0.0


Costs: TypeAlias = NDArray[np.float64]


class PairedEvaluator:
    """Evaluates thresholds on images, paired with the unmerged ViT's answers.

    n_parallel: concurrent batches of one thread each; above 1 on a CPU only.
    Shapes: pixels uint8 (n, H, W, 3); labels (n,), or None, in which case the unmerged ViT's
        answers are the labels
    """

    def __init__(
        self,
        vit: nn.Module,
        rule: InputRule,
        metric: str,
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
        self._pixels, self._order = pixels, np.arange(len(pixels))
        logits, gmacs = self._run(Thresholds(2.0, 0.0, 2.0, self.depth), 0, len(pixels))
        self.unmerged_gmacs = float(gmacs[0])
        two = np.sort(logits, axis=1)[:, -2:]
        # The least certain images come first: they are the most likely to change.
        order = np.argsort(two[:, 1] - two[:, 0], kind="stable")
        self._pixels = pixels[order]
        answers = logits.argmax(1)
        self._labels = (answers if labels is None else labels.numpy())[order]
        self.is_right = answers[order] == self._labels
        # Batch images of similar GMACs together, which reduces padding.
        self._order = np.argsort(self._run(thresholds(_START, self.depth, "similarity"), 0, len(pixels))[1])

    def __len__(self) -> int:
        return len(self._pixels)

    def evaluate(self, found: Thresholds, first: int, last: int) -> tuple[NDArray[np.bool_], Costs]:
        """Return which of images first … last - 1 are right, and their GMACs.

        Shapes: (last - first,) both
        """
        logits, gmacs = self._run(found, first, last)
        return logits.argmax(1) == self._labels[first:last], gmacs

    def measured(self, found: Thresholds, dataset: str, split: str) -> Measured:
        """Return the results of thresholds on all images."""
        is_right, gmacs = self.evaluate(found, 0, len(self))
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
        """Return the logits and GMACs of images first … last - 1."""
        model = adaptive_model(self._vit, found, self._metric, self._embedding)
        classifier = AdaptiveClassifier(model, self._rule).eval().to(self._device)
        chosen = self._order[(self._order >= first) & (self._order < last)]
        size = images_at_once(self._vit, _BATCH, self._n_parallel)
        batches = [chosen[begin : begin + size] for begin in range(0, len(chosen), size)]

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
    """Return the thresholds at a point of the search; three numbers mean no split by size."""
    width = 10 ** -x[0]
    return Thresholds(
        alpha=1 - width,
        beta=10 ** x[1],
        floor=max(-1.0, 1 - width * 10 ** x[2]),
        split_depth=round(x[3]) if len(x) > 3 else depth,
        score=score,
    )


def resolution_points(n_images: int) -> float:
    """Return the loss that n_images cannot rule out even when no answer has changed."""
    return -100 * PairedCounts(n_images, 0, 0, 0).interval()[0]


def images_to_show(max_accuracy_drop: float) -> int:
    """Return how many images rule out a larger loss, where no answer has changed.

    Units: points, above 0
    """
    most = 1
    while resolution_points(most) > max_accuracy_drop:
        most *= 2
    return bisect_left(range(most + 1), -max_accuracy_drop, lo=1, key=lambda n: -resolution_points(n))


def is_within_bound(counts: PairedCounts, max_accuracy_drop: float) -> bool:
    """Return whether the interval of the loss ends within the bound plus the resolution.

    Units: points
    """
    return -100 * counts.interval()[0] <= max_accuracy_drop + resolution_points(counts.n_images) + 1e-9


def _can_stay_within(counts: PairedCounts, max_accuracy_drop: float, n_images: int) -> bool:
    """Return whether the bound can hold on all n_images, without further loss."""
    n_lost = counts.n_only_base
    n_won = min(counts.n_only_other * n_images // counts.n_images, n_images - n_lost)
    return is_within_bound(PairedCounts(n_images - n_lost - n_won, n_lost, n_won, 0), max_accuracy_drop)


def attempt(
    evaluator: PairedEvaluator, found: Thresholds, max_accuracy_drop: float, best_costs: Costs | None = None
) -> tuple[Trial, Costs]:
    """Try thresholds on growing parts of the images, until they exceed the bound or the best GMACs.

    Return the trial and the GMACs of the images that it used.
    Shapes: best_costs (n,), the GMACs of each image under the best thresholds so far
    """
    is_right, costs = np.empty(0, bool), np.empty(0)
    while len(costs) < len(evaluator):
        first = len(costs)
        more_right, more_costs = evaluator.evaluate(found, first, min(max(_FIRST_IMAGES, 2 * first), len(evaluator)))
        is_right, costs = np.concatenate([is_right, more_right]), np.concatenate([costs, more_costs])
        counts = count_pairs(evaluator.is_right[: len(costs)], is_right)
        can_stay_within = _can_stay_within(counts, max_accuracy_drop, len(evaluator))
        if not can_stay_within or _is_more_expensive(costs, best_costs):
            break
    gmacs = float(costs.mean())
    if best_costs is not None:
        gmacs *= float(best_costs.mean() / best_costs[: len(costs)].mean())
    return Trial(found, gmacs, counts, can_stay_within), costs


def _is_more_expensive(costs: Costs, best_costs: Costs | None) -> bool:
    """Return whether the images cost over three standard errors more than under the best trial."""
    if best_costs is None:
        return False
    more = costs - best_costs[: len(costs)]
    return bool(more.mean() > 3 * more.std() / math.sqrt(len(more)))


def search(
    evaluator: PairedEvaluator,
    max_accuracy_drop: float,
    *,
    n_trials: int,
    seed: int,
    score: Score = "similarity",
    split_depth: int | None = None,
    known: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
    """Return the trial with the fewest GMACs within the bound.

    split_depth: a fixed value, or None to search it. known: trials of an interrupted search, in
        order, to reuse.
    Raises: ValueError where no trial is within the bound.
    """
    remembered: Iterator[Trial] = iter(known)
    best: Trial | None = None
    best_costs: Costs | None = None

    def objective(x: NDArray[np.float64]) -> float:
        nonlocal best, best_costs
        found = thresholds(x.tolist(), evaluator.depth, score)
        trial, costs = next(remembered, None), None
        if trial is None:
            trial, costs = attempt(evaluator, found, max_accuracy_drop, best_costs)
            on_trial(trial)
        is_complete = trial.n_images == len(evaluator)
        if trial.is_within_bound and is_complete and (best is None or trial.gmacs < best.gmacs):
            best = trial
            best_costs = costs if costs is not None else evaluator.evaluate(found, 0, len(evaluator))[1]
        if trial.is_within_bound:
            return trial.gmacs / evaluator.unmerged_gmacs
        # Outside the bound the objective exceeds 1 and grows with the loss. A trial that gained
        # accuracy, perhaps by luck, has a negative loss and a low objective: it attracts the
        # search, but it is never the result.
        return 1 + trial.loss_points * trial.n_images

    generations = max(0, math.ceil(n_trials / (4 * _POPULATION)) - 1)
    differential_evolution(
        objective,
        [*_BOUNDS, (0, evaluator.depth) if split_depth is None else (split_depth, split_depth)],
        integrality=[False, False, False, True],
        x0=[*_START, evaluator.depth if split_depth is None else split_depth],
        popsize=_POPULATION,
        maxiter=generations,
        tol=0,
        polish=False,
        rng=seed,
    )
    if best is None:
        raise ValueError(
            f"max_accuracy_drop {max_accuracy_drop}: none of {n_trials} trials stays within it on "
            f"{len(evaluator)} images; allow a larger drop, more images or more trials"
        )
    return best


def write_trial(trial: Trial, file: Path) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(trial)) + "\n")


def read_trials(file: Path) -> list[Trial]:
    """Read trials that `write_trial` wrote, without an incomplete last line."""
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
