"""Settings: what an operator can choose, read from the environment (prefix `DTEM_`) here and nowhere else."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.cgroups import count_cpus
from app.errors import SettingsError

PREFIX = "DTEM_"
SECRETS = {"api_keys"}  # their values are never said back
USERINFO = re.compile(r"//[^/@]*@")  # nor the password of an address


class Settings(BaseSettings):
    """One field per environment variable: `DTEM_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes any free one")
    model_store: Path = Field(default=Path("model_store"), description="folder with <model>/<version>/manifest.json")
    default_model: str | None = Field(
        default=None, description="model for requests that name none; else the first by name"
    )
    format: Literal["onnx", "torchscript"] = Field(default="onnx", description="which graphs of the store to run")
    precision: str = Field(default="float32", description="which precision of the store to run")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where to run them; there is no silent fallback")
    n_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads of one inference; else the CPUs that affinity and quota leave us",
    )
    share_weights: bool = Field(
        default=False,
        description="ONNX: all rates share one mapped copy of the weights; 2-16 % slower, a fraction of the memory",
    )
    max_body_bytes: int = Field(default=20_000_000, ge=1, description="largest request body, bytes")
    max_inside_bytes: int = Field(
        default=1_000_000_000, ge=1, description="bodies of all requests inside together, bytes"
    )
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="largest image, pixels of its header and after resizing"
    )
    max_files: int = Field(default=32, ge=1, description="most files in one multipart request")
    n_decode_threads: int = Field(default=2, ge=1, le=256, description="images decoded at the same time")
    max_inside_images: int = Field(
        default=256, ge=1, description="most images inside the service (decoding, queued, running)"
    )
    max_queue_images: int = Field(default=64, ge=1, description="most images waiting for one variant")
    max_batch_images: int = Field(default=8, ge=1, description="most images in one run of the model")
    n_lanes: int = Field(
        default=2, ge=1, le=16, description="runs that share the device: one fills the gaps of the other"
    )
    batch_wait_ms: float = Field(
        default=0.0, ge=0, description="how long an incomplete batch waits for more, from its first image"
    )
    patience_ms: float = Field(
        default=250.0,
        gt=0,
        description="requests without a deadline are ordered among those with one as if it were this; "
        "where it is not kept, requests that consent are degraded",
    )
    stall_seconds: float = Field(
        default=10.0, gt=0, description="a run of a batch that takes longer makes the service neither live nor ready"
    )
    reload_seconds: float = Field(
        default=5.0, ge=0, le=86400, description="between two looks at the model store; 0: at SIGHUP only"
    )
    keep_alive_seconds: int = Field(
        default=65, ge=1, description="idle connections are kept; above the usual balancer's 60"
    )
    drain_seconds: int = Field(
        default=20, ge=2, description="from SIGTERM to the end: what requests in flight have, the grace included"
    )
    drain_grace_seconds: float = Field(
        default=0.0, ge=0, description="how long SIGTERM leaves the port open, not ready, for balancers to notice"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level that is logged; debug: every request has its line"
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="one JSON object a line, or text for people to read"
    )
    trace_endpoint: str | None = Field(
        default=None, description="OTLP/HTTP address that traces are sent to, as http://collector:4318/v1/traces"
    )
    trace_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="share of the requests traced, where their caller has not decided it"
    )
    api_keys: SecretStr | None = Field(
        default=None, description="keys of the callers, with commas between; without any, everyone may call"
    )
    api_key_file: Path | None = Field(default=None, description="the same from a file, one key a line")
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of the certificate and its chain; with it the service speaks HTTPS alone"
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's key, without a passphrase")

    @field_validator("trace_endpoint")
    @classmethod
    def _require_address(cls, address: str | None) -> str | None:
        if address is not None:
            parts = urlsplit(address)  # whose ValueError says what is wrong with a port or a bracket
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError("not an http:// or https:// address")
            if parts.path in ("", "/"):
                raise ValueError("has no path; collectors take traces at /v1/traces")
            if parts.username is not None or parts.password is not None:
                raise ValueError("holds a password; send it by OTEL_EXPORTER_OTLP_HEADERS")
        return address

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.max_files > self.max_queue_images:
            raise ValueError(
                f"DTEM_MAX_FILES ({self.max_files}) exceeds DTEM_MAX_QUEUE_IMAGES ({self.max_queue_images}):"
                " such a request could never be admitted"
            )
        if self.max_body_bytes > self.max_inside_bytes:
            raise ValueError(
                f"DTEM_MAX_BODY_BYTES ({self.max_body_bytes}) exceeds DTEM_MAX_INSIDE_BYTES ({self.max_inside_bytes}):"
                " such a body could never be admitted"
            )
        if self.max_queue_images > self.max_inside_images:
            raise ValueError(
                f"DTEM_MAX_QUEUE_IMAGES ({self.max_queue_images}) exceeds DTEM_MAX_INSIDE_IMAGES"
                f" ({self.max_inside_images}): such a queue could never be full"
            )
        if self.share_weights and (self.format, self.device) != ("onnx", "cpu"):
            raise ValueError("DTEM_SHARE_WEIGHTS is for DTEM_FORMAT=onnx on DTEM_DEVICE=cpu alone")
        if self.api_keys is not None and self.api_key_file is not None:
            raise ValueError("DTEM_API_KEYS and DTEM_API_KEY_FILE exclude each other")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("DTEM_TLS_CERTIFICATE and DTEM_TLS_KEY need each other")
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
        """Whether batches are filled up to a few sizes: a GPU plans, and keeps memory, for each size that it meets."""
        return self.device == "cuda"

    @property
    def n_inference_threads(self) -> int:
        return self.n_threads or count_cpus()


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the environment.

    Raises: SettingsError for a value out of range, a contradiction, or a `DTEM_` variable that does not exist.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise SettingsError(f"{unknown[0]}: no such setting; there are {', '.join(sorted(known))}")
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(dict(item)) for item in error.errors())) from error


def _describe(item: dict[str, Any]) -> str:
    if not item["loc"]:
        return str(item["msg"]).removeprefix("Value error, ")
    name, message = str(item["loc"][0]), str(item["msg"]).removeprefix("Value error, ")
    value = "***" if name in SECRETS else USERINFO.sub("//***@", str(item["input"]))
    return f"{PREFIX}{name.upper()}={value}: {message}"
