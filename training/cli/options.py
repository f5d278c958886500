"""Options that several commands share. This module imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and which images.

    run: folder of a training run. published: a version in the store. weights: a checkpoint (file, folder,
        local-dir:PATH, hf-hub:NAME), or "pretrained" with architecture. One of these three is given.
    architecture, arguments: a timm name and arguments of timm.create_model; for a checkpoint, None and empty
        mean what it states or implies.
    task: of a run or an architecture. embedding: a file; None means that of the run or version.
    data: a dataset or a folder with one subfolder per class; None means that of the run or version. n_images: None
        means all, or 10,000 digits. labels: a file with the names of the model's outputs.
    mean, std, crop_pct, crop_mode, interpolation: of the pixels; None means those of the weights.
    activation: softmax or sigmoid; None means that of the version, or softmax.
    """

    run: Path | None = None
    published: Path | None = None
    architecture: str | None = None
    weights: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    task: str = "classify"
    embedding: Path | None = None
    data: str | None = None
    split: str = "test"
    n_images: int | None = None
    labels: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    activation: str | None = None

    def require_data(self) -> None:
        """Raises: ValueError where neither the options nor a run or version can name the data"""
        if (self.architecture or self.weights) and not (self.data or self.run or self.published):
            named = "--weights" if self.weights else "--architecture"
            raise ValueError(f"{named} needs --data: a folder with one subfolder per class, or 'digits'")


def parse_rates(text: str) -> tuple[int, ...]:
    """Parse rates: `0,2,4`, or `0:16:2` with the end included. Raises: ValueError"""
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            rates = tuple(range(first, last + 1, step))
        else:
            rates = tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise ValueError(f"{text!r}: expected rates such as 0,8,16, or first:last:step such as 0:16:2") from err
    if not rates or min(rates) < 0 or len(set(rates)) < len(rates):
        raise ValueError(f"{text!r}: expected distinct rates of at least 0")
    return rates
