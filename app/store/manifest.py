"""Manifest: the contract between the two halves, as strict models; the JSON Schema in the store is made from them.

`python -m app.store.manifest > model_store/manifest.schema.json` rewrites the schema.
"""

import datetime
import json
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, model_validator

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
# A plain name in the version folder: no separator, no leading dot.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Channel = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


UNMARKED_PRECISION = "float32"


class VariantKey(NamedTuple):
    """What tells the variants of a task apart; as text it names their golden outputs.

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
    """A part of the manifest: no unknown keys, no coercion, no change after reading."""

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
    """How an image becomes the graph's input."""

    name: Text
    layout: Literal["NHWC"]
    dtype: Literal["uint8"]
    height: PositiveInt
    width: PositiveInt
    resize_shorter_side: PositiveInt
    crop: Literal["center"]
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    jpeg_draft_scale: PositiveInt = Field(description="JPEG is decoded no smaller than this times resize_shorter_side")
    alpha_background: tuple[Channel, Channel, Channel]
    mean: tuple[float, float, float] = Field(description="for the reader: the graph itself normalises")
    std: tuple[Positive, Positive, Positive] = Field(description="for the reader: the graph itself normalises")

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize_shorter_side < max(self.height, self.width):
            raise ValueError("resize_shorter_side is smaller than the crop")
        return self


class Output(Part):
    """The graph's outputs by name; `app.store.outputs` has their types and shapes."""

    name: Text = Field(description="the output of the task: for `classify` the logits")
    dtype: Literal["float32"]
    tokens: Text | None = Field(
        default=None, description="int64: tokens entering each block, and tokens left; of adaptive policies"
    )
    gmacs: Text | None = Field(default=None, description="float32: cost of each image; of adaptive policies")


class FileDigest(Part):
    sha256: Sha256
    bytes: Count


class Accuracy(Part):
    top1: Fraction
    dataset: Text
    split: Text
    n_images: PositiveInt
    ci95: tuple[Fraction, Fraction]
    date: datetime.date

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        if self.ci95[0] > self.ci95[1]:
            raise ValueError("ci95 is not ordered")
        return self


class Spread(Part):
    """Percentiles over images."""

    p5: Positive
    p95: Positive


class Variant(Part):
    """One graph: a policy, at a rate or adapting to the image, in a precision and a format."""

    id: Text
    policy: Name
    r: Count | None = Field(description="null where the policy adapts to the image")
    precision: Name
    format: Name
    file: FileName
    requires: tuple[FileName, ...]
    opset: PositiveInt | None
    schedule: tuple[Count, ...] = Field(description="tokens merged in each block")
    tokens: tuple[PositiveInt, ...] = Field(description="tokens entering each block, and how many are left at the end")
    gmacs: Positive
    data_dependent: bool = Field(
        description="whether token counts depend on the data; then `tokens`, `schedule` and `gmacs` are means"
    )
    accuracy: Accuracy | None
    gmacs_spread: Spread | None = Field(default=None, description="over images, where token counts depend on the data")
    calibration: FileName | None = Field(default=None, description="the thresholds that it merges by")
    promise: Text | None = Field(default=None, description="what an image's answer owes to the others of its batch")

    @property
    def key(self) -> VariantKey:
        return VariantKey(self.policy, self.r, self.precision)

    @model_validator(mode="after")
    def _adapts_or_has_a_rate(self) -> Self:
        if self.data_dependent != (self.r is None):
            raise ValueError(f"{self.id}: r is {self.r}, and data_dependent {self.data_dependent}")
        if self.data_dependent and (self.gmacs_spread is None or self.promise is None):
            raise ValueError(f"{self.id}: token counts depend on the data, so gmacs_spread and promise are needed")
        return self


class Golden(Part):
    file: FileName
    atol: Positive


class Embedding(Part):
    """The add-on by which the policy dtem compares tokens."""

    file: FileName
    dim: PositiveInt
    r: Count = Field(description="the reduction rate that it was trained at")
    recipe: str = Field(description="how it was trained; empty where its file does not say")


class Default(Part):
    policy: Name
    r: Count | None


class Manifest(Part):
    """A model version: what it is, what it reads and answers, and every file of it."""

    schema_version: Literal[1]
    name: Name
    version: Version
    task: Literal["classify"] = Field(default="classify", description="what the graphs compute")
    architecture: Architecture
    labels: tuple[Text, ...] = Field(min_length=1)
    training: Training
    git_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
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
            raise ValueError(f"files: {MANIFEST_FILE} cannot hold its own digest")
        _require_files(self)
        _require_unique("variants", [(*variant.key, variant.format) for variant in self.variants])
        _require_unique("variant ids", [variant.id for variant in self.variants])
        for variant in self.variants:
            _require_schedule(variant, self.architecture)
            if variant.data_dependent and None in (self.output.tokens, self.output.gmacs):
                raise ValueError(f"output: {variant.id} needs tokens and gmacs")
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
    doubles = [key for key in keys if keys.count(key) > 1]
    if doubles:
        raise ValueError(f"{what}: {doubles[0]} is there more than once")


def _require_schedule(variant: Variant, architecture: Architecture) -> None:
    """Check that the schedule has one number per block and that the token counts follow from it."""
    depth, tokens = architecture.depth, variant.tokens
    if len(variant.schedule) != depth or len(tokens) != depth + 1:
        raise ValueError(f"{variant.id}: {depth} blocks need {depth} numbers in schedule and {depth + 1} in tokens")
    if tokens[0] != architecture.n_tokens or tokens[-1] < architecture.n_protected:
        raise ValueError(f"{variant.id}: tokens do not begin with n_tokens or end below n_protected")
    if variant.r == 0 and any(variant.schedule):
        raise ValueError(f"{variant.id}: r is 0 but the schedule merges")
    left = [before - merged for before, merged in zip(tokens, variant.schedule, strict=False)]
    if not variant.data_dependent and left != list(tokens[1:]):
        raise ValueError(f"{variant.id}: tokens do not follow from schedule")


def make_schema() -> dict[str, Any]:
    """Make the JSON Schema of the manifest; rules across fields are checked by the models alone."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Manifest of a model version"}
    return {**head, **{key: value for key, value in Manifest.model_json_schema().items() if key != "title"}}


def render_schema() -> str:
    return json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(render_schema(), end="")
