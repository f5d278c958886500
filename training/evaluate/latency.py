"""Latency of one image on this machine, for several graphs in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

N_ROUNDS = 15
Name = TypeVar("Name")


def median_ms(
    graphs: Mapping[Name, Callable[[Tensor], Any]], images: Tensor, n_rounds: int = N_ROUNDS
) -> dict[Name, float]:
    """Return the median latency of each graph, one image at a time, a different one in each round.

    Graphs take turns, so drift of the machine affects all alike.
    Shapes: images uint8 (n, H, W, 3)
    """
    seconds: dict[Name, list[float]] = {name: [] for name in graphs}
    # The first round warms up.
    for index in range(n_rounds + 1):
        image = images[index % len(images)][None]
        for name, run in graphs.items():
            start = time.perf_counter()
            run(image)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(measured[1:]) for name, measured in seconds.items()}
