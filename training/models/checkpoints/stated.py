"""What the configuration beside a checkpoint states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.models.checkpoints.files import UnreadableCheckpoint

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Stated:
    """Architecture, labels and preprocessing, as far as a configuration states them.

    arguments: for `load_vit`. pixels: keys of timm's `pretrained_cfg`. is_antialiased: how the
        source library resamples position embeddings.
    """

    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    pixels: dict[str, Any] = field(default_factory=dict)
    activation: Activation = "softmax"
    notes: tuple[str, ...] = ()
    is_antialiased: bool = True


def plain_labels(stated: Any, file: Path) -> tuple[str, ...] | None:
    """Return labels by index, None where there are none or only placeholders (LABEL_0).

    Raises: UnreadableCheckpoint where an index has no label.
    """
    if not stated:
        return None
    if isinstance(stated, Mapping):
        by_index = {int(index): str(label) for index, label in stated.items()}
        if missing := sorted(set(range(len(by_index))) - set(by_index)):
            raise UnreadableCheckpoint(f"{file} has no label of class {missing[0]}: expected 0 to {len(by_index) - 1}")
        labels = tuple(by_index[index] for index in range(len(by_index)))
    else:
        labels = tuple(map(str, stated))
    return None if all(label == f"LABEL_{index}" for index, label in enumerate(labels)) else labels
