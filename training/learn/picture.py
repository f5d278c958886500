"""learning.png: loss and validation of a run over its images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_MAX_POINTS = 200


def draw_learning(log: Path, picture: Path) -> None:
    """Draw the losses and, if there is one, the validation in a metrics.jsonl as a PNG.

    Where there are many steps, a point of a loss is the mean of several.
    """
    figures: dict[str, list[tuple[float, float]]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        for name in entry:
            if name.endswith("loss") or name == "validation_top1":
                figures.setdefault(name, []).append((entry["n_seen"], entry[name]))
    validation = figures.pop("validation_top1", None)
    figure = Figure(figsize=(8, 4))
    # A layout engine would take longer than the drawing.
    figure.subplots_adjust(left=0.08, right=0.92, bottom=0.13, top=0.96)
    axes = figure.subplots()
    axes.set(xlabel="images", ylabel="loss")
    for name, points in figures.items():
        axes.plot(*_means(np.array(points)), label=name.replace("_", " "), linewidth=1)
    if validation:
        right = axes.twinx()
        right.set_ylabel("validation top-1 %")
        n_seen, top1 = np.array(validation).T
        right.plot(n_seen, 100 * top1, "k.--", linewidth=1, label="validation top-1")
        right.legend(loc="lower right")
    if figures:
        axes.legend(loc="upper right")
    figure.savefig(picture, format="png", dpi=100)


def _means(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shapes: (N, 2) -> (2, at most _MAX_POINTS)"""
    parts = np.array_split(points, min(len(points), _MAX_POINTS))
    return np.array([part.mean(0) for part in parts]).T
