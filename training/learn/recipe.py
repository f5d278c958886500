"""Recipes: all settings of a training run, read from one TOML file and saved with each checkpoint."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
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
    """AdamW of a backbone. Each stage has its own learning rate."""

    batch_size: int
    """Images per step. Unit: images."""
    warmup_images: int
    """Linear warm-up of the learning rate. Unit: images."""
    weight_decay: float
    """Weight decay of matrices; biases and scales have none."""
    clip_norm: float
    """Largest norm of the gradient."""
    label_smoothing: float
    """Share of the target that all classes get alike, from 0 to 1."""


@dataclass(frozen=True)
class Stage:
    """One stage of a backbone's curriculum."""

    name: str
    """For the progress line."""
    n_images: int
    """Length of the stage. Unit: images."""
    learning_rate: tuple[float, float]
    """At the start and at the end of the stage, with half a cosine between."""
    kept_patches: int
    """Patches kept of each image, those of the digit first. Unit: patches."""
    token_label_weight: float
    """Weight of the loss of token labels; 0 for none."""
    task: Task = field(default_factory=Task)
    """The difficulty of the images."""


@dataclass(frozen=True)
class Recipe:
    """A ViT from scratch, on the reference task. One process, on a CPU."""

    file: str
    seed: int
    """Seed of the initial weights."""
    architecture: str
    """Name of a plain ViT in timm."""
    arguments: dict[str, Any]
    """Arguments of timm.create_model: img_size, num_classes, ..."""
    optimiser: Optimiser
    stages: tuple[Stage, ...]
    weights: str | None = None
    """Safetensors file to start from; none means from scratch."""
    loss: str = DEFAULT_LOSS
    """Name of a loss in training/learn/losses.py."""

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def n_images(self) -> int:
        return sum(stage.n_images for stage in self.stages)


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up, then half a cosine."""

    learning_rate: tuple[float, float]
    """At the start and at the end of the run, with half a cosine between."""
    weight_decay: float
    """Weight decay of matrices; biases and scales have none."""
    clip_norm: float
    """Largest norm of the gradient."""
    warmup_images: int = 0
    """Linear warm-up of the learning rate. Unit: images."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""

    def __post_init__(self) -> None:
        for name, maximum in (("learning_rate", math.inf), ("betas", 1.0)):
            object.__setattr__(self, name, _pair(name, getattr(self, name), maximum))
        _check_numbers(self, clip_norm=_ABOVE_0, weight_decay=_FROM_0)
        _check_whole(self, warmup_images=0)


@dataclass(frozen=True)
class LayerwiseAdamW(AdamW):
    """AdamW whose learning rate is lower in early blocks. Source: arXiv 2106.08254, appendix."""

    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one before it, above 0, at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(self, layer_decay=(_TINY, 1.0))


@dataclass(frozen=True)
class Data:
    """The images of a run, and their augmentation.

    Folders are normalised as timm states for the architecture's weights; to override, set arguments
    = { pretrained_cfg_overlay = { mean = ..., std = ... } }.
    """

    source: str = REFERENCE_DATASET
    """"digits" (the reference task), or a folder with one subfolder of images per class."""
    validation: str | None = None
    """Such a folder, to measure top-1 on. Digits have their own split."""
    labels: str | None = None
    """File with the labels in the order of the model's outputs, one per line or JSON; none means the
    sorted names of the folders. Folders only."""
    n_validation: int = 500
    """Largest number of images to validate on, spread over the classes; 0 for none. Unit: images."""
    n_distinct: int | None = None
    """Number of different digits; digits only. Unit: images."""
    share: float = 1.0
    """Share of each class that is used, above 0, at most 1; folders only."""
    label_smoothing: float = 0.0
    """Share of the target that all classes get alike, from 0 to 1."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none. With mixup, one of the two is drawn for each batch."""
    randaugment: str | None = None
    """timm's name of a RandAugment, e.g. "rand-m9-mstd0.5-inc1"; folders only."""
    erasing: float = 0.0
    """Probability that a random box is erased; folders only."""
    min_crop: float = 0.08
    """Smallest random crop, as a share of the image's area, above 0, at most 1; folders only."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right differ, as in text. Folders only."""

    def __post_init__(self) -> None:
        share = (0.0, 1.0)
        _check_numbers(self, share=(_TINY, 1.0), label_smoothing=share, erasing=share, mixup=_FROM_0, cutmix=_FROM_0)
        _check_numbers(self, min_crop=(_TINY, 1.0), flip=share)
        _check_whole(self, n_validation=0)
        find_dataset(self.source).check_options(self)


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """What recipes that learn from images share."""

    file: str
    seed: int
    """Seed of the weights, the order of the images and their augmentation."""
    architecture: str
    """Name of a plain ViT in timm."""
    arguments: dict[str, Any]
    """Arguments of timm.create_model: img_size, num_classes, ..."""
    batch_size: int
    """Images per step, over all processes. Unit: images."""
    data: Data
    n_images: int = 0
    """Length of the run, repeats included. Give this or epochs. Unit: images."""
    epochs: int = 0
    """Length of the run. Unit: passes over the images."""
    micro_batch: int | None = None
    """Images per forward pass, where a batch exceeds the memory; gradients accumulate. Unit: images."""
    precision: Precision = "bfloat16"
    """Of the ViT's products, by autocast. Weights and merging decisions are in float32."""
    loss: str = DEFAULT_LOSS
    """Name of a loss in training/learn/losses.py."""

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
    """DTEM's embedding for a ViT, or one of its baselines."""

    mode: Mode
    """What learns. "modular": the embedding. "end-to-end": both. "hard keys", "soft keys": the ViT."""
    r: int
    """Rate to train at. Unit: tokens removed per block."""
    weights: str
    """Weights of the ViT: a safetensors file, or "pretrained" for timm's."""
    embedding: AdamW | None = None
    vit: AdamW | None = None
    dim: int | None = None
    """Width d' of the embedding; none means the published one for the ViT's width."""
    relaxation: Relaxation = field(default_factory=Relaxation)
    keep_tail: bool = True
    """Whether merged tokens stay, with their remaining size, while the embedding learns."""
    embedding_weights: str | None = None
    """Embedding file to start from, of the same width; none means random."""

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


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(ImageRecipe):
    """A ViT on your own images, from timm's weights, a file, or from scratch."""

    optimiser: LayerwiseAdamW
    weights: str | None = None
    """Weights to start from: "pretrained" for timm's, or a checkpoint; none means from scratch."""
    drop_path: float = 0.0
    """Probability that the last block is skipped; that of earlier blocks is proportionally lower."""
    ema: float | None = None
    """Decay of an average of the weights, e.g. 0.9998, which is then validated and written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(self, drop_path=(0.0, 0.9))
        if self.ema is not None:
            _check_numbers(self, ema=(_TINY, 1 - 1e-9))


AnyRecipe = Recipe | DtemRecipe | FinetuneRecipe


@dataclass(frozen=True)
class Kind:
    """A kind of recipe, and the tables of its file.

    parts: table -> (field, its dataclass). repeated: tables that are written [[table]]. model: the
        fields of the recipe that are in [model].
    """

    recipe: type[AnyRecipe]
    parts: Mapping[str, tuple[str, type[Any]]]
    repeated: tuple[str, ...] = ()
    model: tuple[str, ...] = ("architecture", "arguments", "weights")

    @property
    def top(self) -> list[str]:
        """The keys outside all tables."""
        elsewhere = {"file", *self.model, *(name for name, _ in self.parts.values())}
        return [field.name for field in fields(self.recipe) if field.name not in elsewhere]


KINDS = {
    "backbone": Kind(Recipe, {"optimiser": ("optimiser", Optimiser), "stage": ("stages", Stage)}, repeated=("stage",)),
    "dtem": Kind(
        DtemRecipe,
        {
            "data": ("data", Data),
            "embedding": ("embedding", AdamW),
            "vit": ("vit", AdamW),
            "relaxation": ("relaxation", Relaxation),
        },
    ),
    "finetune": Kind(
        FinetuneRecipe,
        {"data": ("data", Data), "optimiser": ("optimiser", LayerwiseAdamW)},
        model=("architecture", "arguments", "weights", "drop_path"),
    ),
}


def read_recipe(path: Path) -> AnyRecipe:
    """Read a TOML recipe.

    Raises: ValueError naming the file and the key that is missing, unknown or invalid.
    """
    try:
        content = tomllib.loads(path.read_text())
        name = content.pop("kind", None)
        if name not in KINDS:
            raise ValueError(f"kind {name!r}: expected one of {', '.join(KINDS)}")
        return _built_recipe(KINDS[name], path.name, content)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: {err}") from err


def _built_recipe(kind: Kind, file: str, content: dict[str, Any]) -> AnyRecipe:
    _check_keys("the recipe", content, [*kind.top, "model", *kind.parts])
    settings: dict[str, Any] = {"file": file}
    for table, (name, part) in kind.parts.items():
        if table not in content:
            continue
        entry = content.pop(table)
        if table in kind.repeated:
            if not isinstance(entry, list) or not entry:
                raise ValueError(f"{table} {entry!r}: expected tables [[{table}]]")
            settings[name] = tuple(_built(f"[[{table}]] {n}", part, one) for n, one in enumerate(entry, 1))
        else:
            settings[name] = _built(f"[{table}]", part, entry)
    model = _table("[model]", content.pop("model", {}))
    _check_keys("[model]", model, kind.model)
    recipe: AnyRecipe = _made("the recipe", kind.recipe, {**content, **model, **settings})
    return recipe


def _built(where: str, part: type[Any], entry: Any) -> Any:
    settings = _table(where, entry)
    _check_keys(where, settings, [field.name for field in fields(part)])
    if part is Stage and "task" in settings:
        settings = {**settings, "task": _built(f"{where} task", Task, settings["task"])}
    if part is Stage and "learning_rate" in settings:
        settings = {**settings, "learning_rate": _pair("learning_rate", settings["learning_rate"])}
    return _made(where, part, settings)


def _made(where: str, part: type[Any], settings: dict[str, Any]) -> Any:
    required = [field.name for field in fields(part) if field.default is field.default_factory is MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return part(**settings)


def _table(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} {entry!r}: expected a table of keys")
    return entry


def _check_keys(where: str, found: Iterable[str], accepted: Sequence[str]) -> None:
    for name in found:
        if name not in accepted:
            near = get_close_matches(name, accepted, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where} has no key {name!r}: {hint}expected {', '.join(sorted(accepted))}")


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
