"""Accuracy on a set of images with its 95 % interval, and the time of inference alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.tasks.measure import TOP1, Measure
from training.tasks.task import output_tensors

Model = Callable[[Tensor], Any]
"""Shapes: uint8 (B, H, W, 3) -> the task's result; if adaptive, also (B, blocks + 1) tokens, (B,) GMACs"""


@dataclass(frozen=True)
class Measurement:
    """The results of a model on a set of images, in order.

    Shapes: scores (images, …), as the measure makes them; tokens (images, blocks + 1) and gmacs
        (images,) of an adaptive model
    """

    measure: Measure
    scores: NDArray[Any]
    inference_seconds: float
    tokens: NDArray[np.int64] | None = None
    gmacs: NDArray[np.float32] | None = None

    @cached_property
    def _summary(self) -> tuple[float, tuple[float, float]]:
        return self.measure.summarise(self.scores)

    @property
    def value(self) -> float:
        return self._summary[0]

    @property
    def ci95(self) -> tuple[float, float]:
        return self._summary[1]

    @property
    def images_per_second(self) -> float:
        return len(self.scores) / self.inference_seconds


def measure(
    model: Model, batches: Iterable[tuple[Tensor, Tensor]], n_parallel: int = 1, *, by: Measure = TOP1
) -> Measurement:
    """Run the model once on every batch and compare its results with the labels.

    n_parallel: concurrent batches. On a CPU, several with one thread each are faster than one with
        several threads.
    """
    scores: list[NDArray[Any]] = []
    tokens: list[NDArray[np.int64]] = []
    gmacs: list[NDArray[np.float32]] = []
    seconds = 0.0
    remaining = iter(batches)
    with ThreadPoolExecutor(n_parallel) as pool:
        while group := list(islice(remaining, n_parallel)):
            start = time.perf_counter()
            answers = list(pool.map(model, [pixels for pixels, _ in group]))
            seconds += time.perf_counter() - start
            for answer, (_, labels) in zip(answers, group, strict=True):
                result, *costs = output_tensors(answer)
                scores.append(by.score(result, labels))
                if costs:
                    tokens.append(costs[0].numpy())
                    gmacs.append(costs[1].numpy())
    if not tokens:
        return Measurement(by, np.concatenate(scores), seconds)
    return Measurement(by, np.concatenate(scores), seconds, np.concatenate(tokens), np.concatenate(gmacs))
