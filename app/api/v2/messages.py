"""Messages: the JSON of the protocol. Requests are validated against these models."""

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
    """In a shape, -1 stands for the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata] = Field(description="provide exactly one of them")
    outputs: list[TensorMetadata]


class Reshape(BaseModel):
    shape: list[int]


class InputConfig(BaseModel):
    """Each input is optional, but one of them is required."""

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
    """The part of Triton's model configuration that applies to this service."""

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
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class Envelope(BaseModel):
    """Unknown members are ignored, because the protocol allows extensions. Lists end at their first error."""

    model_config = ConfigDict(strict=True)


class RequestInput(Envelope):
    """In a parsed request, the data is its JSON text."""

    name: str
    shape: list[int] = Field(fail_fast=True)
    datatype: str
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data_size`, if the data is binary")
    data: Annotated[Any, SkipValidation] = Field(
        default=None, description="integers, flat or nested as `shape`; or image files, each a base64 string"
    )


class RequestOutput(Envelope):
    name: str
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data`, `classification`")


class InferRequest(Envelope):
    id: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="the query parameters of `/classify`, and `binary_data_output`",
        examples=[{"r": 8}],
    )
    inputs: list[RequestInput] = Field(
        description="one tensor: pixels or image files",
        json_schema_extra={"minItems": 1, "maxItems": 1},
        fail_fast=True,
    )
    outputs: list[RequestOutput] | None = Field(default=None, description="default: all outputs", fail_fast=True)


class ResponseOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters | None = Field(default=None, description="`binary_data_size`, if the data is binary")
    data: list[float | int | str] | None = Field(default=None, description="flat, in row-major order")


class InferResponse(BaseModel):
    id: str | None = None
    model_name: str
    model_version: str
    parameters: Parameters = Field(
        description="policy and r that ran, GMACs, measured top-1, batch size, timings in ms"
    )
    outputs: list[ResponseOutput]
