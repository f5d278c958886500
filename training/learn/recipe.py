"""A recipe: everything that decides a training run, read from one TOML file and saved whole with each checkpoint."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from training.data.digits import Task
from training.merging.relaxed import Relaxation

Mode = Literal["modular", "end-to-end", "hard keys", "soft keys"]
"""modular: a frozen ViT, its embedding learns through relaxed merging. end-to-end: nine steps of the ViT, merging hard
by the embedding, then one of the embedding. The other two are what to compare with: the ViT alone learns, merging by
its own keys, hard (ToMe trained) or relaxed.
"""


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
    """A backbone. Units: see the parts. `file` is the recipe's file name, for the manifest of what comes of it.

    weights: a safetensors file to begin with; without one training is from scratch.
    """

    file: str
    seed: int
    architecture: str
    arguments: dict[str, Any]
    optimiser: Optimiser
    stages: tuple[Stage, ...]
    weights: str | None = None

    @property
    def n_images(self) -> int:
        return sum(stage.n_images for stage in self.stages)


@dataclass(frozen=True)
class AdamW:
    """learning_rate: at the run's begin and at its end, half a cosine between them, after a linear warm-up."""

    learning_rate: tuple[float, float]
    weight_decay: float
    clip_norm: float
    warmup_images: int = 0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "betas"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))


@dataclass(frozen=True)
class Data:
    """What is learnt from.

    source: "digits", or a folder with one folder of images a class; validation: such a folder, for digits their split.
    n_distinct: how many different images; None is all of a folder's. share: of a folder's images, e.g. 0.01.
    mixup, cutmix: alphas, 0 for none; randaugment: timm's name for it; erasing: probability.
    """

    source: str = "digits"
    validation: str | None = None
    n_distinct: int | None = None
    share: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: str | None = None
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.source == "digits":
            if not self.n_distinct:
                raise ValueError("data of digits needs n_distinct, how many images to draw")
            if self.randaugment or self.erasing or self.share != 1:
                raise ValueError("randaugment, erasing and share are for folders of images, not for digits")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share}: expected above 0, at most 1")


@dataclass(frozen=True)
class DtemRecipe:
    """DTEM, or what it is compared with.

    r: the rate trained at; dim: d', None for the published one; keep_tail: see `RelaxedVisionTransformer`;
    n_images: seen in all, many of them more than once; batch_size: over all processes.
    weights: of the ViT, a safetensors file or "pretrained". vit: how it learns, where it does.
    """

    file: str
    mode: Mode
    seed: int
    r: int
    architecture: str
    arguments: dict[str, Any]
    weights: str
    n_images: int
    batch_size: int
    data: Data
    embedding: AdamW | None = None
    vit: AdamW | None = None
    dim: int | None = None
    relaxation: Relaxation = field(default_factory=Relaxation)
    keep_tail: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode {self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        wanted = {"modular": ["embedding"], "end-to-end": ["embedding", "vit"]}.get(self.mode, ["vit"])
        given = [name for name in ("embedding", "vit") if getattr(self, name) is not None]
        if wanted != given:
            raise ValueError(f"mode {self.mode!r} learns by [{'] and ['.join(wanted)}], not {given}")
        if self.r < 1 and self.mode != "hard keys":
            raise ValueError(f"r {self.r}: mode {self.mode!r} learns from what merges, so r must be at least 1")

    @property
    def n_steps(self) -> int:
        return self.n_images // self.batch_size


def read_recipe(path: Path) -> Recipe | DtemRecipe:
    """Read a TOML recipe.

    Raises: ValueError that names the file and the key, for a missing, unknown or ill-valued one.
    """
    content = tomllib.loads(path.read_text())
    try:
        kind = content.pop("kind")
        if kind not in _KINDS:
            raise ValueError(f"kind {kind!r}: expected {' or '.join(map(repr, _KINDS))}")
        return _KINDS[kind](path.name, content)
    except KeyError as err:
        raise ValueError(f"{path}: key {err} is missing") from err
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: {err}") from err


def _backbone(file: str, content: dict[str, Any]) -> Recipe:
    stages = tuple(_stage(entry) for entry in content.pop("stage"))
    model = content.pop("model")
    return Recipe(file=file, optimiser=Optimiser(**content.pop("optimiser")), stages=stages, **model, **content)


def _dtem(file: str, content: dict[str, Any]) -> DtemRecipe:
    parts: dict[str, Any] = {name: AdamW(**content.pop(name)) for name in ("embedding", "vit") if name in content}
    parts["relaxation"] = Relaxation(**content.pop("relaxation", {}))
    return DtemRecipe(file=file, data=Data(**content.pop("data")), **parts, **content.pop("model"), **content)


_KINDS: dict[str, Callable[[str, dict[str, Any]], Recipe | DtemRecipe]] = {"backbone": _backbone, "dtem": _dtem}


def _stage(entry: dict[str, Any]) -> Stage:
    rates = _pair("learning_rate", entry["learning_rate"])
    return Stage(**{**entry, "learning_rate": rates, "task": Task(**entry.get("task", {}))})


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} {value!r}: expected two numbers, e.g. [at the begin, at the end]")
    return float(value[0]), float(value[1])
