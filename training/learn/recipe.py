"""A recipe: everything that decides a training run, read from one TOML file and saved whole with each checkpoint."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.digits import Task


@dataclass(frozen=True)
class Optimiser:
    """AdamW; its learning rate rises linearly for `warmup_images`, and then each stage says where it goes."""

    batch_size: int
    warmup_images: int
    weight_decay: float
    clip_norm: float
    label_smoothing: float


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum: how many images of which task, and how many patches of each are kept.

    learning_rate: at the stage's begin and at its end, half a cosine between them.
    """

    name: str
    n_images: int
    learning_rate: tuple[float, float]
    kept_patches: int
    token_label_weight: float
    task: Task = field(default_factory=Task)


@dataclass(frozen=True)
class Recipe:
    """Units: see the parts. `file` is the recipe's file name, for the manifest of what comes of it."""

    file: str
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
        stages = tuple(_stage(entry) for entry in content.pop("stage"))
        model = content.pop("model")
        return Recipe(
            file=path.name, optimiser=Optimiser(**content.pop("optimiser")), stages=stages, **model, **content
        )
    except KeyError as err:
        raise ValueError(f"{path}: key {err} is missing") from err
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: {err}") from err


def _stage(entry: dict[str, Any]) -> Stage:
    rates = entry["learning_rate"]
    if not isinstance(rates, list) or len(rates) != 2:
        raise ValueError(f"learning_rate {rates!r}: expected [at the stage's begin, at its end]")
    return Stage(**{**entry, "learning_rate": (rates[0], rates[1]), "task": Task(**entry.get("task", {}))})
