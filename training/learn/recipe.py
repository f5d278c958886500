"""Recipes: all settings of a training run, read from one TOML file and saved with each checkpoint."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from training.data.digits import Task
from training.data.sources import REFERENCE_DATASET, find_dataset
from training.learn.losses import DEFAULT_LOSS, check_loss
from training.merging.relaxed import Relaxation

# The smallest number above 0.
_TINY = math.ulp(0.0)
_ABOVE_0, _FROM_0 = (_TINY, math.inf), (0.0, math.inf)

Mode = Literal["modular", "end-to-end", "hard keys", "soft keys"]
"""modular: the ViT is frozen, and its embedding learns through relaxed merging. end-to-end: nine
steps train the ViT with hard merging by the embedding, then one step trains the embedding. hard
keys and soft keys are baselines: the ViT alone learns, merging by its keys, hard (ToMe, trained) or
relaxed.
"""


Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Optimiser:
    """AdamW. The learning rate rises linearly for `warmup_images`; then the stages set it."""

    batch_size: int
    warmup_images: int
    weight_decay: float
    clip_norm: float
    label_smoothing: float


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: task, number of images, and patches kept of each.

    learning_rate: at the start and at the end of the stage, with half a cosine between.
    """

    name: str
    n_images: int
    learning_rate: tuple[float, float]
    kept_patches: int
    token_label_weight: float
    task: Task = field(default_factory=Task)


@dataclass(frozen=True)
class Recipe:
    """A recipe of a backbone.

    file: the recipe's file name, for the manifest. weights: a safetensors file to start from; None
        means from scratch.
    loss: a name in `LOSSES`.
    """

    file: str
    seed: int
    architecture: str
    arguments: dict[str, Any]
    optimiser: Optimiser
    stages: tuple[Stage, ...]
    weights: str | None = None
    loss: str = DEFAULT_LOSS

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def n_images(self) -> int:
        return sum(stage.n_images for stage in self.stages)


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up, then half a cosine. learning_rate: at the start and at the end"""

    learning_rate: tuple[float, float]
    weight_decay: float
    clip_norm: float
    warmup_images: int = 0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name, maximum in (("learning_rate", math.inf), ("betas", 1.0)):
            object.__setattr__(self, name, _pair(name, getattr(self, name), maximum))
        _check_numbers(self, clip_norm=_ABOVE_0, weight_decay=_FROM_0)
        _check_whole(self, warmup_images=0)


@dataclass(frozen=True)
class Data:
    """The images of a run, and their augmentation.

    source: a name in `DATASETS`, or a folder with one subfolder of images per class. Folders are
        normalised as timm states for the architecture's weights; to override, set arguments = {
        pretrained_cfg_overlay = { mean = …, std = … } }.
    validation: such a folder; digits have their own split. n_validation: the images, spread over
        the classes, on which top-1 is measured at each checkpoint.
    n_distinct: number of different digits. share: of each class of a folder, above 0, at most 1.
    mixup, cutmix: alphas, 0 for none. randaugment: timm's name for it. erasing: probability.
    """

    source: str = REFERENCE_DATASET
    validation: str | None = None
    n_validation: int = 500
    n_distinct: int | None = None
    share: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: str | None = None
    erasing: float = 0.0

    def __post_init__(self) -> None:
        share = (0.0, 1.0)
        _check_numbers(self, share=(_TINY, 1.0), label_smoothing=share, erasing=share, mixup=_FROM_0, cutmix=_FROM_0)
        _check_whole(self, n_validation=0)
        find_dataset(self.source).check_options(self)


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """What recipes that learn from images share.

    n_images: the length of the run in images, repeats included; or epochs: its length in passes
        over the data.
    batch_size: over all processes. micro_batch: images per forward pass, where the batch exceeds
        the memory; gradients accumulate, so the steps are equal up to rounding and the draws of
        dropout.
    precision: of the ViT's products, by autocast. Weights and all merging decisions are in float32.
    loss: a name in `LOSSES`.
    """

    file: str
    seed: int
    architecture: str
    arguments: dict[str, Any]
    batch_size: int
    data: Data
    n_images: int = 0
    epochs: int = 0
    micro_batch: int | None = None
    precision: Precision = "bfloat16"
    loss: str = DEFAULT_LOSS

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision {self.precision!r}: expected one of {', '.join(get_args(Precision))}")
        _check_whole(self, seed=0, batch_size=1, n_images=0, epochs=0)
        if self.micro_batch is not None:
            _check_whole(self, micro_batch=1)
        if bool(self.n_images) == bool(self.epochs):
            raise ValueError(f"n_images {self.n_images} and epochs {self.epochs}: expected one of them, above 0")

    def counted_in_images(self, n_distinct: int) -> Self:
        """Return the recipe with its length in images, for epochs of n_distinct images."""
        return replace(self, n_images=self.epochs * n_distinct, epochs=0) if self.epochs else self

    @property
    def n_steps(self) -> int:
        return self.n_images // self.batch_size


@dataclass(frozen=True, kw_only=True)
class DtemRecipe(ImageRecipe):
    """A recipe of DTEM, or of one of its baselines.

    r: the rate to train at. dim: d', None for the published value. keep_tail: see
        `RelaxedVisionTransformer`.
    weights: of the ViT, a safetensors file or "pretrained". vit, embedding: their optimisers, None
        where frozen.
    embedding_weights: an embedding file to start from, of the same d'; None means the
        initialisation of nn.Linear.
    """

    mode: Mode
    r: int
    weights: str
    embedding: AdamW | None = None
    vit: AdamW | None = None
    dim: int | None = None
    relaxation: Relaxation = field(default_factory=Relaxation)
    keep_tail: bool = True
    embedding_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode {self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        wanted = {"modular": ["embedding"], "end-to-end": ["embedding", "vit"]}.get(self.mode, ["vit"])
        given = [name for name in ("embedding", "vit") if getattr(self, name) is not None]
        if wanted != given:
            raise ValueError(f"mode {self.mode!r} needs [{'] and ['.join(wanted)}], and the recipe has {given}")
        if self.embedding_weights is not None and self.embedding is None:
            raise ValueError(f"embedding_weights {self.embedding_weights!r}: mode {self.mode!r} has no embedding")
        _check_whole(self, r=0)
        if self.dim is not None:
            _check_whole(self, dim=1)
        if self.r < 1 and self.mode != "hard keys":
            raise ValueError(f"r {self.r}: mode {self.mode!r} learns through merging: expected at least 1")


def read_recipe(path: Path) -> Recipe | DtemRecipe:
    """Read a TOML recipe.

    Raises: ValueError naming the file and the key that is missing, unknown or invalid.
    """
    try:
        content = tomllib.loads(path.read_text())
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


def _pair(name: str, value: Any, maximum: float = math.inf) -> tuple[float, float]:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(entry) for entry in value)
    if not is_pair or min(value) < 0 or max(value) > maximum:
        bounds = "of at least 0" if math.isinf(maximum) else f"from 0 to {maximum:g}"
        raise ValueError(f"{name} {value!r}: expected two numbers {bounds}")
    return float(value[0]), float(value[1])


def _check_numbers(part: object, **bounds: tuple[float, float]) -> None:
    for name, (minimum, maximum) in bounds.items():
        value = getattr(part, name)
        if not _is_number(value) or not minimum <= value <= maximum:
            low = "above 0" if minimum == _TINY else f"of at least {minimum:g}"
            high = "" if math.isinf(maximum) else f", at most {maximum:g}"
            raise ValueError(f"{name} {value!r}: expected a number {low}{high}")


def _check_whole(part: object, **minima: int) -> None:
    for name, bound in minima.items():
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} {value!r}: expected a whole number of at least {bound}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
