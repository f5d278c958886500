"""Response: the outputs as JSON, followed by the outputs requested as binary. Pure functions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from numpy.typing import NDArray

from app.api.v2.outputs import DATATYPES, Results, classify_rows
from app.api.v2.request import HEADER_LENGTH, InferenceRequest, RequestedOutput
from app.api.v2.tensors import BINARY_SIZE, LENGTH
from app.observability.record import RequestRecord
from app.store.manifest import Manifest

JSON, BINARY = "application/json", "application/octet-stream"


@dataclass(frozen=True)
class Rendered:
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Tensor:
    name: str
    values: NDArray[Any]
    is_binary: bool


def count_json_numbers(request: InferenceRequest, n_classes: int) -> int:
    """Estimate the number of JSON numbers in a response."""
    n_columns = sum(n_classes for output in request.outputs if not output.is_binary and output.n_classes is None)
    return n_columns * len(request.images)


def render_response(request: InferenceRequest, results: Results, manifest: Manifest, record: RequestRecord) -> Rendered:
    tensors = [_make_tensor(requested, results, manifest.labels) for requested in request.outputs]
    binaries = [_write_binary(tensor.values) if tensor.is_binary else None for tensor in tensors]
    document = {
        **({} if request.id is None else {"id": request.id}),
        "model_name": manifest.name,
        "model_version": manifest.version,
        "parameters": describe_run(results, record),
        "outputs": [_describe(tensor, binary) for tensor, binary in zip(tensors, binaries, strict=True)],
    }
    # Encoded in Python, because the C encoder would hold the GIL for thousands of numbers.
    head = "".join(json.JSONEncoder(allow_nan=False).iterencode(document)).encode("ascii")
    if binaries == [None] * len(binaries):
        return Rendered(head, {"Content-Type": JSON})
    body = b"".join([head, *(binary for binary in binaries if binary is not None)])
    return Rendered(body, {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))})


def describe_run(results: Results, record: RequestRecord) -> dict[str, Any]:
    """Describe what ran. The protocol allows no null, so that what does not apply is omitted.

    Under load the images of a request may run as several variants; `r` and accuracy are those of the cheapest.
    """
    spec = min((result.variant.spec for result in results), key=lambda spec: spec.gmacs)
    accuracy = spec.accuracy
    described = {
        "policy": spec.policy,
        "r": spec.r,
        "gmacs": fmean(result.gmacs for result in results),
        **({} if accuracy is None else {f"accuracy_{accuracy.measure}": accuracy.value}),
        "accuracy_dataset": None if accuracy is None else accuracy.dataset,
        "batch_size": max(result.batch_size for result in results),
        "degraded": any(result.is_degraded for result in results),
        **{f"{stage}_ms": duration for stage, duration in record.durations_ms().items()},
    }
    return {name: value for name, value in described.items() if value is not None}


def _make_tensor(requested: RequestedOutput, results: Results, labels: Sequence[str]) -> Tensor:
    values = requested.output.compute(results)
    if requested.n_classes is not None:
        values = classify_rows(values, requested.n_classes, labels)
    return Tensor(requested.output.name, values, requested.is_binary)


def _describe(tensor: Tensor, binary: bytes | None) -> dict[str, Any]:
    head = {"name": tensor.name, "datatype": DATATYPES[tensor.values.dtype.kind], "shape": list(tensor.values.shape)}
    if binary is not None:
        return {**head, "parameters": {BINARY_SIZE: len(binary)}}
    return {**head, "data": tensor.values.ravel().tolist()}


def _write_binary(values: NDArray[Any]) -> bytes:
    """Encode as little-endian, in row-major order; each string is preceded by its length."""
    if values.dtype.kind != "O":
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [text.encode() for text in values.ravel()]
    return b"".join(LENGTH.pack(len(text)) + text for text in texts)
