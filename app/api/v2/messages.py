"""Documents: the JSON of the protocol, as OpenAPI describes it; a request's JSON is held to its model here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

ParameterValue = str | int | float | bool
Parameters = dict[str, ParameterValue]


class ProtocolError(BaseModel):
    error: str


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ModelNames(BaseModel):
    models: list[str]


class TensorMetadata(BaseModel):
    """-1 in a shape is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata] = Field(description="give one of them")
    outputs: list[TensorMetadata]


class Reshape(BaseModel):
    shape: list[int]


class InputConfig(BaseModel):
    """One of the inputs has to be there, so each alone is optional."""

    name: str
    data_type: str
    format: str
    dims: list[int] = Field(description="without the number of images")
    reshape: Reshape | None = None
    optional: Literal[True]


class OutputConfig(BaseModel):
    name: str
    data_type: str
    dims: list[int] = Field(description="without the number of images")
    reshape: Reshape | None = None


class VersionNumbers(BaseModel):
    versions: list[int]


class VersionPolicy(BaseModel):
    specific: VersionNumbers


class ModelConfig(BaseModel):
    """What of Triton's model configuration applies here."""

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: int
    input: list[InputConfig]
    output: list[OutputConfig]


class IndexEntry(BaseModel):
    name: str
    version: str
    state: Literal["READY"]
    reason: Literal[""]


class Envelope(BaseModel):
    """Members that are not named here are not looked at, as the protocol lets it grow."""

    model_config = ConfigDict(strict=True)


class RequestInput(Envelope):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data_size` where the data is binary")
    data: Annotated[Any, SkipValidation] = Field(
        default=None, description="numbers, flat or nested as `shape` says; or encoded images, each a string of base64"
    )


class RequestOutput(Envelope):
    name: str
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data`, `classification`")


class InferRequest(Envelope):
    id: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="what `/classify` takes as its query, and `binary_data_output`",
        examples=[{"r": 8}],
    )
    inputs: list[RequestInput] = Field(
        description="one tensor: pixels, or encoded images", json_schema_extra={"minItems": 1, "maxItems": 1}
    )
    outputs: list[RequestOutput] | None = Field(default=None, description="default: all of them")


class ResponseOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters | None = Field(default=None, description="`binary_data_size` where the data is binary")
    data: list[float | int | str] | None = Field(default=None, description="flat, row by row")


class InferResponse(BaseModel):
    id: str | None = None
    model_name: str
    model_version: str
    parameters: Parameters = Field(description="what ran: policy, r, GMACs, measured top-1, batch size, timings in ms")
    outputs: list[ResponseOutput]
