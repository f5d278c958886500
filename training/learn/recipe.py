"""A recipe: everything that decides a training run, read from one TOML file and saved whole with each checkpoint."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.digits import Task


@dataclass(frozen=True)
class Optimiser:
    """AdamW under a cosine schedule with linear warm-up. Units: warm-up in images, rates per step."""

    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_images: int
    weight_decay: float
    clip_norm: float
    label_smoothing: float


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum: how many images of which task, and how many patches of each are kept."""

    name: str
    n_images: int
    kept_patches: int
    token_label_weight: float
    task: Task = field(default_factory=Task)


@dataclass(frozen=True)
class Recipe:
    seed: int
    architecture: str
    arguments: dict[str, Any]
    optimiser: Optimiser
    stages: tuple[Stage, ...]

    @property
    def n_images(self) -> int:
        return sum(stage.n_images for stage in self.stages)


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe.

    Raises: ValueError that names the file and the key, for a missing, unknown or ill-valued one.
    """
    content = tomllib.loads(path.read_text())
    try:
        kind = content.pop("kind")
        if kind != "backbone":
            raise ValueError(f"kind {kind!r}: expected 'backbone'")
        stages = tuple(Stage(**{**stage, "task": Task(**stage.get("task", {}))}) for stage in content.pop("stage"))
        model = content.pop("model")
        return Recipe(optimiser=Optimiser(**content.pop("optimiser")), stages=stages, **model, **content)
    except KeyError as err:
        raise ValueError(f"{path}: key {err} is missing") from err
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: {err}") from err
