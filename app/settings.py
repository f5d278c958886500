"""Settings: read from environment variables with the prefix `DTEM_`, only here."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from app.backends import ENGINES
from app.errors import SettingsError
from app.system.cgroups import count_cpus

PREFIX = "DTEM_"
# Never repeated in messages; nor are passwords in addresses.
SECRETS = {"api_keys"}
USERINFO = re.compile(r"//[^/@]*@")


def _require_engine(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"no such engine; accepted: {', '.join(ENGINES)}")
    return name


EngineName = Annotated[str, AfterValidator(_require_engine), Field(json_schema_extra={"enum": list(ENGINES)})]


class Settings(BaseModel):
    """Each field is read from the variable `DTEM_<NAME>`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0: any free port")
    model_store: Path = Field(default=Path("model_store"), description="folder with <model>/<version>/manifest.json")
    default_model: str | None = Field(
        default=None,
        description="model of requests that name none; set it if the store has several models. "
        "default: the model whose first version is the oldest at start",
    )
    engine: EngineName = Field(default="onnxruntime", description="engine that runs the graphs")
    precision: str = Field(default="float32", description="precision of the graphs to run")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device that runs the graphs; without fallback")
    n_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads per batch; default: the CPUs allowed by affinity and quota",
    )
    share_weights: bool = Field(
        default=False,
        description="ONNX Runtime on the CPU: all variants share one memory-mapped copy of the weights; "
        "2-16 % slower, a fraction of the memory",
    )
    max_body_bytes: int = Field(default=20_000_000, ge=1, description="maximum size of a request body")
    max_in_flight_bytes: int = Field(
        default=1_000_000_000, ge=1, description="maximum total size of the request bodies in flight"
    )
    max_pixels: int = Field(default=50_000_000, ge=1, description="maximum image size, by header and after resizing")
    max_request_pixels: int = Field(
        default=200_000_000, ge=1, description="maximum size of all images of a request together, by header"
    )
    max_decode_bytes: int = Field(
        default=300_000_000,
        ge=1,
        description="maximum memory, by estimate, of the images being decoded; an image that needs more is refused",
    )
    max_files: int = Field(default=32, ge=1, description="maximum number of files in a multipart request")
    n_decode_threads: int = Field(default=2, ge=1, le=256, description="images decoded concurrently")
    max_in_flight_images: int = Field(default=256, ge=1, description="maximum images decoding, queued or running")
    max_queue_images: int = Field(default=64, ge=1, description="maximum queue length per variant")
    max_batch_images: int = Field(default=8, ge=1, description="maximum batch size")
    max_concurrent_batches: int = Field(
        default=2,
        ge=1,
        le=16,
        description="maximum batches that run concurrently; two keep the device busy between batches",
    )
    max_batch_delay_ms: float = Field(
        default=0.0, ge=0, description="maximum wait of an incomplete batch for more images"
    )
    target_latency_ms: float = Field(
        default=250.0,
        gt=0,
        description="target latency of requests without a deadline. "
        "When it is exceeded, requests that opted in run at a higher r",
    )
    stall_seconds: float = Field(
        default=10.0, gt=0, description="if a batch runs longer, the service is neither live nor ready"
    )
    reload_seconds: float = Field(
        default=5.0, ge=0, le=86400, description="interval between scans of the model store; 0: only on SIGHUP"
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="maximum open connections; beyond it, the one that has been idle longest is closed",
    )
    keep_alive_seconds: int = Field(
        default=65, ge=1, description="keep-alive timeout; longer than a typical load balancer's 60 s"
    )
    head_timeout_seconds: float = Field(
        default=20.0, gt=0, description="maximum time from the first byte of a request to the end of its headers"
    )
    body_timeout_seconds: float = Field(
        default=30.0, gt=0, description="interval in which a request body must make progress; then 408"
    )
    min_body_bytes_per_second: int = Field(
        default=1000, ge=1, description="minimum progress of a request body, averaged over that interval"
    )
    write_timeout_seconds: float = Field(
        default=30.0, gt=0, description="maximum time in which a client reads nothing of its response"
    )
    drain_seconds: int = Field(default=20, ge=2, description="maximum time from SIGTERM to exit, grace period included")
    drain_grace_seconds: float = Field(
        default=0.0,
        ge=0,
        description="time after SIGTERM to keep accepting connections, so that load balancers can react",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="minimum level; debug also logs requests that run no model"
    )
    log_format: Literal["json", "text"] = Field(default="json", description="one JSON object per line, or plain text")
    trace_endpoint: str | None = Field(
        default=None, description="OTLP/HTTP address for traces, such as http://collector:4318/v1/traces"
    )
    trace_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="fraction of requests traced, unless the client's trace context decides"
    )
    api_keys: SecretStr | None = Field(
        default=None, description="accepted API keys, separated by commas; default: no key needed"
    )
    api_key_file: Path | None = Field(default=None, description="file of accepted API keys, one per line")
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of the certificate chain; enables HTTPS, and disables HTTP"
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the private key, without a passphrase")

    @field_validator("trace_endpoint")
    @classmethod
    def _require_address(cls, address: str | None) -> str | None:
        if address is not None:
            # Raises ValueError for an invalid port or bracket.
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError("not an http:// or https:// address")
            if parts.path in ("", "/"):
                raise ValueError("has no path; collectors receive traces at /v1/traces")
            if parts.username is not None or parts.password is not None:
                raise ValueError("must not contain credentials; use OTEL_EXPORTER_OTLP_HEADERS")
        return address

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.max_pixels > self.max_request_pixels:
            raise ValueError(
                f"DTEM_MAX_PIXELS ({self.max_pixels}) exceeds DTEM_MAX_REQUEST_PIXELS ({self.max_request_pixels}):"
                " such an image would never be admitted"
            )
        if self.max_files > self.max_queue_images:
            raise ValueError(
                f"DTEM_MAX_FILES ({self.max_files}) exceeds DTEM_MAX_QUEUE_IMAGES ({self.max_queue_images}):"
                " such a request would never be admitted"
            )
        if self.max_body_bytes > self.max_in_flight_bytes:
            raise ValueError(
                f"DTEM_MAX_BODY_BYTES ({self.max_body_bytes}) exceeds DTEM_MAX_IN_FLIGHT_BYTES"
                f" ({self.max_in_flight_bytes}): such a body would never be admitted"
            )
        if self.max_queue_images > self.max_in_flight_images:
            raise ValueError(
                f"DTEM_MAX_QUEUE_IMAGES ({self.max_queue_images}) exceeds DTEM_MAX_IN_FLIGHT_IMAGES"
                f" ({self.max_in_flight_images}): such a queue would never fill up"
            )
        if self.share_weights and not (ENGINES[self.engine].can_share_weights and self.device == "cpu"):
            able = " or ".join(name for name, engine in ENGINES.items() if engine.can_share_weights)
            raise ValueError(f"DTEM_SHARE_WEIGHTS needs DTEM_ENGINE={able} and DTEM_DEVICE=cpu")
        if self.api_keys is not None and self.api_key_file is not None:
            raise ValueError("DTEM_API_KEYS and DTEM_API_KEY_FILE are mutually exclusive")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("DTEM_TLS_CERTIFICATE and DTEM_TLS_KEY must be set together")
        if "trace_sample_ratio" in self.model_fields_set and self.trace_endpoint is None:
            raise ValueError("DTEM_TRACE_SAMPLE_RATIO needs DTEM_TRACE_ENDPOINT")
        if self.drain_grace_seconds + 1 > self.drain_seconds:
            raise ValueError(
                f"DTEM_DRAIN_GRACE_SECONDS ({self.drain_grace_seconds:g}) leaves less than a second of"
                f" DTEM_DRAIN_SECONDS ({self.drain_seconds}) to the requests in flight"
            )
        return self

    @property
    def is_padded(self) -> bool:
        """Whether to pad batches to a few sizes: a GPU plans and allocates memory for each new size."""
        return self.device == "cuda"

    @property
    def n_inference_threads(self) -> int:
        return self.n_threads or count_cpus()


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from environment variables. An empty value counts as unset.

    Raises: SettingsError for an invalid value, a contradiction, or an unknown `DTEM_` variable.
    """
    given = {name.upper(): value for name, value in environment.items() if name.upper().startswith(PREFIX)}
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(set(given) - known)
    if unknown:
        raise SettingsError(f"{unknown[0]}: no such setting; accepted: {', '.join(sorted(known))}")
    values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items() if value}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(dict(item)) for item in error.errors())) from error


def _describe(item: dict[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    value = "***" if name in SECRETS else USERINFO.sub("//***@", str(item["input"]))
    return f"{PREFIX}{name.upper()}={value}: {message}"
