"""Manifest: the contract between training and serving, as strict models.

`python -m app.store.manifest > training/export/manifest.schema.json` rewrites the JSON Schema.
"""

import datetime
import json
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

MANIFEST_FILE = "manifest.json"

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
# Name of a file in the version folder: no separator, no leading dot.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Channel = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

# Left out of a key, so that the keys of published versions stay valid.
UNMARKED_PRECISION = "float32"


class VariantKey(NamedTuple):
    """Identifies a variant. Its text, <policy>[-r<r>][-<precision>], names the variant's golden outputs.

    r: None for an adaptive policy.
    """

    policy: str
    r: int | None
    precision: str

    def __str__(self) -> str:
        rate = "" if self.r is None else f"-r{self.r}"
        precision = "" if self.precision == UNMARKED_PRECISION else f"-{self.precision}"
        return f"{self.policy}{rate}{precision}"


class Part(BaseModel):
    """A part of the manifest: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Architecture(Part):
    timm_name: Text
    timm_arguments: dict[str, JsonValue]
    depth: PositiveInt
    width: PositiveInt
    n_tokens: PositiveInt
    n_protected: Count


class Training(Part):
    dataset: Text
    recipe: Text
    licence: Text
    credits: tuple[Text, ...]


class Input(Part):
    """Preprocessing: from an image to the graph's input."""

    name: Text
    layout: Literal["NHWC"]
    dtype: Literal["uint8"]
    height: PositiveInt
    width: PositiveInt
    resize_height: PositiveInt | None = Field(default=None, description="with resize_width: see `crop`")
    resize_width: PositiveInt | None = None
    resize_shorter_side: PositiveInt | None = Field(
        default=None, description="in place of resize_height and resize_width; crop `center` only"
    )
    crop: Literal["center", "squash", "border"] = Field(
        description=(
            "how the image is resized before its centre is cropped. center: to cover resize_height x resize_width at "
            "its aspect ratio. squash: to exactly that. border: to fit within that, padded with the mean"
        )
    )
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    jpeg_draft_scale: PositiveInt = Field(description="minimum size of JPEG drafts, times the size after resizing")
    alpha_background: tuple[Channel, Channel, Channel]
    mean: tuple[float, float, float] = Field(
        description="the colour of borders; otherwise informative, since the graph normalises its input"
    )
    std: tuple[Positive, Positive, Positive] = Field(description="informative: the graph normalises its input")

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        crop, shorter = f"{self.height} x {self.width}", self.resize_shorter_side
        height, width = self.resize_height, self.resize_width
        if (shorter is None) == (height is None) or (height is None) != (width is None):
            raise ValueError("expected resize_height and resize_width, or resize_shorter_side")
        if shorter is not None and self.crop != "center":
            raise ValueError(f"crop {self.crop!r} needs resize_height and resize_width, not resize_shorter_side")
        if shorter is not None and shorter < max(self.height, self.width):
            raise ValueError(f"resize_shorter_side ({shorter}) is smaller than the crop ({crop})")
        if height is not None and width is not None and (height < self.height or width < self.width):
            raise ValueError(f"resize_height x resize_width ({height} x {width}) is smaller than the crop ({crop})")
        if self.crop == "border" and not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean {list(self.mean)} is no colour for a border: expected values from 0 to 1")
        return self


class Output(Part):
    """Names of the graph's outputs; `app.store.outputs` has their types and shapes."""

    name: Text = Field(description="output of the task; for `classify`, the logits")
    dtype: Literal["float32", "int64"]
    activation: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="of task `classify`: from logits to probabilities, over all labels or of each label alone",
    )
    tokens: Text | None = Field(
        default=None, description="adaptive policies, int64: tokens entering each block, and tokens left"
    )
    gmacs: Text | None = Field(default=None, description="adaptive policies, float32: cost of each image")


class FileDigest(Part):
    sha256: Sha256
    bytes: Count


class Measured(Part):
    """Images and interval of a measurement."""

    dataset: Text
    split: Text
    n_images: PositiveInt
    ci95: tuple[Fraction, Fraction]
    date: datetime.date

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        if self.ci95[0] > self.ci95[1]:
            raise ValueError(f"ci95 {list(self.ci95)} is not in ascending order")
        return self


class Accuracy(Measured):
    """Top-1, of task `classify`."""

    top1: Fraction

    @property
    def measure(self) -> str:
        return "top1"

    @property
    def value(self) -> float:
        return self.top1


class Score(Measured):
    """The measure of another task, such as the mean intersection over union of segmentation."""

    measure: Name
    value: Fraction


def _kind_of_measurement(entry: Any) -> str:
    is_score = "measure" in entry if isinstance(entry, dict) else isinstance(entry, Score)
    return "score" if is_score else "accuracy"


# A discriminator, so that an invalid entry has the errors of its own kind only.
Measurement = Annotated[
    Annotated[Accuracy, Tag("accuracy")] | Annotated[Score, Tag("score")], Discriminator(_kind_of_measurement)
]


class Spread(Part):
    """Percentiles over images."""

    p5: Positive
    p95: Positive


class Variant(Part):
    """One graph: a policy (at one rate unless it is adaptive) in one precision and format."""

    id: Text
    policy: Name
    r: Count | None = Field(description="null for adaptive policies")
    precision: Name
    format: Name
    file: FileName
    requires: tuple[FileName, ...]
    opset: PositiveInt | None
    schedule: tuple[Count, ...] = Field(description="tokens merged in each block")
    tokens: tuple[PositiveInt, ...] = Field(description="tokens entering each block, and tokens left at the end")
    gmacs: Positive
    data_dependent: bool = Field(
        description="whether token counts depend on the image; if so, `tokens`, `schedule` and `gmacs` are means"
    )
    accuracy: Measurement | None
    gmacs_spread: Spread | None = Field(default=None, description="over images; data-dependent variants only")
    calibration: FileName | None = Field(default=None, description="file of the merging thresholds")
    promise: Text | None = Field(default=None, description="how results depend on the rest of the batch")

    @property
    def key(self) -> VariantKey:
        return VariantKey(self.policy, self.r, self.precision)

    @model_validator(mode="after")
    def _adapts_or_has_a_rate(self) -> Self:
        if self.data_dependent != (self.r is None):
            raise ValueError(f"{self.id}: r={self.r} contradicts data_dependent={self.data_dependent}")
        if self.data_dependent and (self.gmacs_spread is None or self.promise is None):
            raise ValueError(f"{self.id}: data_dependent requires gmacs_spread and promise")
        return self


class Golden(Part):
    file: FileName
    atol: Positive


class Embedding(Part):
    """The decoupled embedding, by which policy dtem compares tokens."""

    file: FileName
    dim: PositiveInt
    r: Count = Field(description="reduction rate in training")
    recipe: str = Field(description="training recipe; empty if unknown")


class Default(Part):
    policy: Name
    r: Count | None


class Manifest(Part):
    """A model version: architecture, input, output, variants and files."""

    schema_version: Literal[1]
    name: Name
    version: Version
    task: Name = Field(default="classify", description="task of the graphs")
    architecture: Architecture
    labels: tuple[Text, ...] = Field(min_length=1)
    training: Training
    git_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        default=None, description="of the exporter; null where it was not in a git checkout"
    )
    exporter: Text | None = Field(default=None, description="package and version that exported")
    min_onnxruntime: Text | None = Field(default=None, description="the least ONNX Runtime that reads the graphs")
    created: AwareDatetime
    input: Input
    output: Output
    files: dict[FileName, FileDigest]
    variants: tuple[Variant, ...] = Field(min_length=1)
    golden: Golden
    default: Default
    embedding: Embedding | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if MANIFEST_FILE in self.files:
            raise ValueError(f"files: {MANIFEST_FILE} cannot contain its own digest")
        _require_files(self)
        _require_unique("variants", [(*variant.key, variant.format) for variant in self.variants])
        _require_unique("variant ids", [variant.id for variant in self.variants])
        for variant in self.variants:
            _require_schedule(variant, self.architecture)
            if variant.data_dependent and None in (self.output.tokens, self.output.gmacs):
                raise ValueError(f"output: {variant.id} requires tokens and gmacs")
        if self.task == "classify" and len(self.labels) == 1 and self.output.activation == "softmax":
            raise ValueError("output: a softmax over one label is always 1; expected activation 'sigmoid'")
        wanted = (self.default.policy, self.default.r)
        if wanted not in [(variant.policy, variant.r) for variant in self.variants]:
            raise ValueError(f"default: no variant with policy {wanted[0]} and r {wanted[1]}")
        return self


def _require_files(manifest: Manifest) -> None:
    wanted = {name for variant in manifest.variants for name in (variant.file, *variant.requires)}
    wanted |= {variant.calibration for variant in manifest.variants if variant.calibration is not None}
    wanted |= {part.file for part in (manifest.golden, manifest.embedding) if part is not None}
    missing = sorted(wanted - set(manifest.files))
    if missing:
        raise ValueError(f"files: {missing[0]} is referenced but not listed")


def _require_unique(what: str, keys: list[Any]) -> None:
    duplicates = [key for key in keys if keys.count(key) > 1]
    if duplicates:
        raise ValueError(f"{what}: {duplicates[0]} is listed more than once")


def _require_schedule(variant: Variant, architecture: Architecture) -> None:
    """Check that the schedule has one number per block, and that the token counts follow from it."""
    depth, tokens = architecture.depth, variant.tokens
    if len(variant.schedule) != depth or len(tokens) != depth + 1:
        raise ValueError(f"{variant.id}: {depth} blocks need {depth} numbers in schedule and {depth + 1} in tokens")
    if tokens[0] != architecture.n_tokens or tokens[-1] < architecture.n_protected:
        raise ValueError(f"{variant.id}: tokens must start at n_tokens and end at n_protected or above")
    if variant.r == 0 and any(variant.schedule):
        raise ValueError(f"{variant.id}: r is 0, but schedule merges tokens")
    left = [before - merged for before, merged in zip(tokens, variant.schedule, strict=False)]
    if not variant.data_dependent and left != list(tokens[1:]):
        raise ValueError(f"{variant.id}: tokens do not follow from schedule")


def make_schema() -> dict[str, Any]:
    """Make the JSON Schema of the manifest. Only the models check rules across fields."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Manifest of a model version"}
    return {**head, **{key: value for key, value in Manifest.model_json_schema().items() if key != "title"}}


def render_schema() -> str:
    return json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(render_schema(), end="")
