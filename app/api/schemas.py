"""Documents: the JSON that the service answers with, and how OpenAPI describes it."""

import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.problems import PROBLEM_MEDIA_TYPE


class Problem(BaseModel):
    """RFC 9457. Further members say which field was refused, its value, and what is accepted."""

    model_config = ConfigDict(extra="allow")

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: str = Field(description="stable name of the problem, for programs")
    request_id: str | None = Field(default=None, description="as in X-Request-ID and in the log; not in a file's own")


class Prediction(BaseModel):
    label: str
    index: int
    probability: float


class ModelName(BaseModel):
    name: str
    version: str


class MeasuredAccuracy(BaseModel):
    """Top-1 as measured when the model was exported."""

    top1: float
    ci95: tuple[float, float]
    dataset: str
    split: str
    n_images: int
    date: datetime.date


class TimingsMs(BaseModel):
    """Units: ms. `total` runs from the last byte of the body to the answer; the others are this image's own."""

    decode: float
    queue: float
    inference: float
    total: float


class Classification(BaseModel):
    """The most probable classes of an image, and what it took to find them."""

    predictions: list[Prediction]
    model: ModelName
    policy: str
    r: int | None = Field(description="null where the policy adapts to the image")
    gmacs: float = Field(description="what this image took")
    accuracy: MeasuredAccuracy | None
    tokens: list[int] = Field(description="of this image: entering each block, and how many are left at the end")
    batch_size: int = Field(description="images that ran together, of however many requests")
    degraded: bool = Field(description="whether the load made it cheaper than it would have been on an idle device")
    timings_ms: TimingsMs


class FileClassification(Classification):
    filename: str | None


class FileProblem(Problem):
    filename: str | None


class Results(BaseModel):
    """One item per file, in the order of the form: its classification or its own problem."""

    results: list[FileClassification | FileProblem]


class LatencyMs(BaseModel):
    """Units: ms of inference for one image alone, on this host, of the latest `n` runs."""

    last: float
    median: float
    n: int


class RunMs(BaseModel):
    """Units: ms that a run of so many images is expected to take on this host, at the present load."""

    batch_size: int
    expected: float


class GmacsSpread(BaseModel):
    """Percentiles over the images that accuracy was measured on."""

    p5: float
    p95: float


class VariantDocument(BaseModel):
    id: str
    policy: str
    r: int | None = Field(description="null where the policy adapts to the image")
    format: str
    precision: str
    gmacs: float
    gmacs_spread: GmacsSpread | None = Field(description="where token counts depend on the image")
    tokens: list[int]
    schedule: list[int]
    data_dependent: bool = Field(
        description="whether token counts depend on the image; then `gmacs`, `tokens` and `schedule` are means"
    )
    promise: str | None = Field(description="what an image's answer owes to the others of its batch")
    accuracy: MeasuredAccuracy | None
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
    input: dict[str, Any]
    dataset: str
    licence: str
    credits: list[str]
    git_commit: str
    created: datetime.datetime
    device: str
    default: DefaultDocument
    variants: list[VariantDocument]


class ModelsDocument(BaseModel):
    """All versions of all models; `default` is what a request without `model` and `version` gets."""

    default: ModelName
    models: list[ModelDocument]


class Health(BaseModel):
    status: Literal["alive", "ready"]


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document that a route answers with problems of these statuses."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses}


DESCRIPTIONS = {
    400: "The body or the image is malformed",
    401: "The service has keys, and the request has none of them",
    404: "There is no such model or version",
    413: "Too many bytes, pixels or files",
    415: "Not an image that is read here",
    422: "A query parameter or a form part cannot be used; `accepted` lists what can",
    429: "The queue is full, or the deadline cannot be met; come back after Retry-After seconds",
    500: "The service failed; the reason is in its log",
    503: "The models are still being loaded, the service is draining, or its engine has stalled",
    504: "The deadline is past",
}
