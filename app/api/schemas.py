"""Schemas: the JSON of the responses, and its OpenAPI description."""

import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.problems import PROBLEM_MEDIA_TYPE


class Problem(BaseModel):
    """RFC 9457 problem. Extra members may name the refused field, its value, and what is accepted."""

    model_config = ConfigDict(extra="allow")

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: str = Field(description="stable, machine-readable name of the problem")
    request_id: str | None = Field(
        default=None, description="as in X-Request-ID and the log; absent in the problem of one file of a form"
    )


class Prediction(BaseModel):
    label: str
    index: int
    probability: float = Field(
        description="by the model's `activation`: softmax, over all labels; or sigmoid, of this label alone"
    )


class ModelName(BaseModel):
    name: str
    version: str


class Measurement(BaseModel):
    """Images and interval of a measurement, made when the model was exported."""

    ci95: tuple[float, float]
    dataset: str
    split: str
    n_images: int
    date: datetime.date


class MeasuredAccuracy(Measurement):
    """Top-1 accuracy."""

    top1: float


class MeasuredScore(Measurement):
    """The accuracy of a task other than classification."""

    measure: str
    value: float


class TimingsMs(BaseModel):
    """Units: ms. `total` is from the last byte of the body to the response; the others are of this image."""

    decode: float
    queue: float
    inference: float
    total: float


class Classification(BaseModel):
    """The most probable labels of an image, and their cost."""

    predictions: list[Prediction]
    model: ModelName
    policy: str
    r: int | None = Field(description="null for a policy that adapts to the image")
    gmacs: float = Field(description="cost of this image")
    accuracy: MeasuredAccuracy | None
    tokens: list[int] = Field(description="tokens entering each block, then tokens left at the end; of this image")
    batch_size: int = Field(description="images in the batch, from any number of requests")
    degraded: bool = Field(description="whether the image ran at a higher rate than preferred, because of load")
    timings_ms: TimingsMs


class FileClassification(Classification):
    filename: str | None


class FileProblem(Problem):
    filename: str | None


class Results(BaseModel):
    """The classification or the problem of each file, in the order of the form."""

    results: list[FileClassification | FileProblem]


class LatencyMs(BaseModel):
    """Inference latency of batches of one image on this host, over the latest `n` runs. Units: ms."""

    last: float
    median: float
    n: int


class RunMs(BaseModel):
    """Expected duration of a batch of this size on this host, at the present load. Units: ms."""

    batch_size: int
    expected: float


class GmacsSpread(BaseModel):
    """Percentiles over the images on which accuracy was measured."""

    p5: float
    p95: float


class VariantDocument(BaseModel):
    id: str
    policy: str
    r: int | None = Field(description="null for a policy that adapts to the image")
    format: str
    precision: str
    gmacs: float
    gmacs_spread: GmacsSpread | None = Field(description="null unless token counts depend on the image")
    tokens: list[int]
    schedule: list[int]
    data_dependent: bool = Field(
        description="whether token counts depend on the image; then `gmacs`, `tokens` and `schedule` are means"
    )
    promise: str | None = Field(description="how a result depends on the other images in the batch")
    accuracy: MeasuredAccuracy | MeasuredScore | None
    latency_ms: LatencyMs | None
    run_ms: list[RunMs]


class DefaultDocument(BaseModel):
    policy: str
    r: int | None


class ModelDocument(BaseModel):
    name: str
    version: str
    architecture: str
    labels: list[str]
    activation: Literal["softmax", "sigmoid"] = Field(
        description="from logits to probabilities; sigmoid: the labels are independent, and several can apply"
    )
    input: dict[str, Any]
    dataset: str
    licence: str
    credits: list[str]
    git_commit: str | None
    created: datetime.datetime
    device: str
    default: DefaultDocument
    variants: list[VariantDocument]


class RefusedVersion(ModelName):
    """A version in the store that is not served, and why: the file and what is wrong with it."""

    reason: str


class IgnoredFolder(BaseModel):
    """A folder in the store that is no finished version, and why."""

    folder: str
    reason: str


class ModelsDocument(BaseModel):
    """All versions of all models. `default` serves requests that name no model."""

    default: ModelName
    models: list[ModelDocument]
    refused: list[RefusedVersion] = Field(description="bad versions in the store, which are not served")
    ignored: list[IgnoredFolder] = Field(description="other folders in the store, such as unfinished or misnamed ones")


class Health(BaseModel):
    status: Literal["alive", "ready"]


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the problem responses of a route."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses}


DESCRIPTIONS = {
    400: "Malformed body or image",
    401: "Missing or unknown API key",
    404: "Unknown model or version",
    408: "Headers or body too slow; send the request again",
    413: "Too many bytes, pixels or files",
    414: "Request target too long",
    415: "Unsupported image format or Content-Encoding",
    422: "Invalid parameter or form part; `accepted` lists the valid values",
    429: "Queue full, or deadline cannot be met; retry after Retry-After seconds",
    431: "Headers or trailers too large",
    500: "Internal error; the cause is in the service log",
    501: "Unsupported Transfer-Encoding",
    503: "Models still loading, service draining, or engine stalled",
    504: "Deadline passed",
}
