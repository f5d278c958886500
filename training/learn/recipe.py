"""A recipe: everything that decides a training run, read from one TOML file and saved whole with each checkpoint."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from training.data.digits import Task
from training.merging.relaxed import Relaxation

_TINY = math.ulp(0.0)  # the least number above 0
_ABOVE_0, _FROM_0 = (_TINY, math.inf), (0.0, math.inf)

Mode = Literal["modular", "end-to-end", "hard keys", "soft keys"]
"""modular: a frozen ViT, its embedding learns through relaxed merging. end-to-end: nine steps of the ViT, merging hard
by the embedding, then one of the embedding. The other two are what to compare with: the ViT alone learns, merging by
its own keys, hard (ToMe trained) or relaxed.
"""


Precision = Literal["bfloat16", "float32"]


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
        for name, most in (("learning_rate", math.inf), ("betas", 1.0)):
            object.__setattr__(self, name, _pair(name, getattr(self, name), most))
        _check_numbers(self, clip_norm=_ABOVE_0, weight_decay=_FROM_0)
        _check_whole(self, warmup_images=0)


@dataclass(frozen=True)
class Data:
    """What is learnt from.

    source: "digits", or a folder with one folder of images a class, which are normalised as timm states of the
    architecture's weights (for others: arguments = { pretrained_cfg_overlay = { mean = …, std = … } }).
    validation: such a folder, for digits always their split; n_validation: of how many, spread over its classes, the
    top-1 is measured at each checkpoint. n_distinct: how many different digits; share: of each class of a folder.
    mixup, cutmix: alphas, 0 for none; randaugment: timm's name for it; erasing: probability.
    """

    source: str = "digits"
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
        if self.source != "digits":
            if self.n_distinct is not None:
                raise ValueError(f"n_distinct {self.n_distinct!r}: it is for digits; of a folder learn a share")
            return
        if self.n_distinct is None:
            raise ValueError("data of digits needs n_distinct, how many images to draw")
        _check_whole(self, n_distinct=1)
        if self.randaugment or self.erasing or self.validation or self.share != 1:
            raise ValueError("randaugment, erasing, validation and share are for folders of images, not for digits")


@dataclass(frozen=True)
class DtemRecipe:
    """DTEM, or what it is compared with.

    r: the rate trained at; dim: d', None for the published one; keep_tail: see `RelaxedVisionTransformer`;
    n_images: seen in all, many of them more than once, or else epochs: how often the data is; batch_size: over all
    processes; micro_batch: images that a process computes at a time, where its part of the batch is too much for its
    memory: gradients add up, so the steps are the same but for rounding and the draws of dropout.
    weights: of the ViT, a safetensors file or "pretrained". vit: how it learns, where it does.
    embedding_weights: an embedding's file to begin with, of the same d'; without one it begins as nn.Linear does.
    precision: of the ViT's products, by autocast; weights, and all that decides what merges, are in float32.
    """

    file: str
    mode: Mode
    seed: int
    r: int
    architecture: str
    arguments: dict[str, Any]
    weights: str
    batch_size: int
    data: Data
    n_images: int = 0
    epochs: int = 0
    micro_batch: int | None = None
    embedding: AdamW | None = None
    vit: AdamW | None = None
    dim: int | None = None
    relaxation: Relaxation = field(default_factory=Relaxation)
    keep_tail: bool = True
    precision: Precision = "bfloat16"
    embedding_weights: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision {self.precision!r}: expected one of {', '.join(get_args(Precision))}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode {self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        wanted = {"modular": ["embedding"], "end-to-end": ["embedding", "vit"]}.get(self.mode, ["vit"])
        given = [name for name in ("embedding", "vit") if getattr(self, name) is not None]
        if wanted != given:
            raise ValueError(f"mode {self.mode!r} learns by [{'] and ['.join(wanted)}], not {given}")
        if self.embedding_weights is not None and self.embedding is None:
            raise ValueError(f"embedding_weights {self.embedding_weights!r}: mode {self.mode!r} has no embedding")
        _check_whole(self, r=0, seed=0, batch_size=1, n_images=0, epochs=0)
        for name in ("dim", "micro_batch"):
            if getattr(self, name) is not None:
                _check_whole(self, **{name: 1})
        if self.r < 1 and self.mode != "hard keys":
            raise ValueError(f"r {self.r}: mode {self.mode!r} learns from what merges, so r must be at least 1")
        if bool(self.n_images) == bool(self.epochs):
            raise ValueError(f"n_images {self.n_images} and epochs {self.epochs}: expected one of them, above 0")

    def counted_in_images(self, n_distinct: int) -> DtemRecipe:
        """Return the same recipe, its length in images where it is in epochs of so many."""
        return replace(self, n_images=self.epochs * n_distinct, epochs=0) if self.epochs else self

    @property
    def n_steps(self) -> int:
        return self.n_images // self.batch_size


def read_recipe(path: Path) -> Recipe | DtemRecipe:
    """Read a TOML recipe.

    Raises: ValueError that names the file and the key, for a missing, unknown or ill-valued one.
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


def _pair(name: str, value: Any, most: float = math.inf) -> tuple[float, float]:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(entry) for entry in value)
    if not is_pair or min(value) < 0 or max(value) > most:
        bounds = "of at least 0" if math.isinf(most) else f"from 0 to {most:g}"
        raise ValueError(f"{name} {value!r}: expected two numbers {bounds}")
    return float(value[0]), float(value[1])


def _check_numbers(part: object, **bounds: tuple[float, float]) -> None:
    for name, (least, most) in bounds.items():
        value = getattr(part, name)
        if not _is_number(value) or not least <= value <= most:
            low = "above 0" if least == _TINY else f"of at least {least:g}"
            high = "" if math.isinf(most) else f", at most {most:g}"
            raise ValueError(f"{name} {value!r}: expected a number {low}{high}")


def _check_whole(part: object, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} {value!r}: expected a whole number of at least {bound}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
