"""Response: what ran and what came out, as JSON with binary tensors behind it where they were asked for. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from numpy.typing import NDArray

from app.api.v2.outputs import DATATYPES, Results, classify_rows
from app.api.v2.request import HEADER_LENGTH, InferenceRequest, WantedOutput
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
    """Estimate how many numbers a response writes as JSON."""
    n_columns = sum(n_classes for output in request.outputs if not output.is_binary and output.n_classes is None)
    return n_columns * len(request.images)


def render_response(request: InferenceRequest, results: Results, manifest: Manifest, record: RequestRecord) -> Rendered:
    tensors = [_make_tensor(wanted, results, manifest.labels) for wanted in request.outputs]
    binaries = [_write_binary(tensor.values) if tensor.is_binary else None for tensor in tensors]
    document = {
        **({} if request.id is None else {"id": request.id}),
        "model_name": manifest.name,
        "model_version": manifest.version,
        "parameters": describe_run(results, record),
        "outputs": [_describe(tensor, binary) for tensor, binary in zip(tensors, binaries, strict=True)],
    }
    # Piece by piece in Python, so that a thread that writes thousands of numbers lets the others run.
    head = "".join(json.JSONEncoder(allow_nan=False).iterencode(document)).encode("ascii")
    if binaries == [None] * len(binaries):
        return Rendered(head, {"Content-Type": JSON})
    body = b"".join([head, *(binary for binary in binaries if binary is not None)])
    return Rendered(body, {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))})


def describe_run(results: Results, record: RequestRecord) -> dict[str, Any]:
    """Say what ran, in the numbers and strings that the protocol has room for; what does not apply is left out.

    The load may spread the images of a request over variants: then `r` and accuracy are those of the cheapest.
    """
    spec = min((result.variant.spec for result in results), key=lambda spec: spec.gmacs)
    described = {
        "policy": spec.policy,
        "r": spec.r,
        "gmacs": fmean(result.gmacs for result in results),
        "accuracy_top1": None if spec.accuracy is None else spec.accuracy.top1,
        "accuracy_dataset": None if spec.accuracy is None else spec.accuracy.dataset,
        "batch_size": max(result.batch_size for result in results),
        "degraded": any(result.is_degraded for result in results),
        **{f"{stage}_ms": duration for stage, duration in record.durations_ms().items()},
    }
    return {name: value for name, value in described.items() if value is not None}


def _make_tensor(wanted: WantedOutput, results: Results, labels: Sequence[str]) -> Tensor:
    values = wanted.output.compute(results)
    if wanted.n_classes is not None:
        values = classify_rows(values, wanted.n_classes, labels)
    return Tensor(wanted.output.name, values, wanted.is_binary)


def _describe(tensor: Tensor, binary: bytes | None) -> dict[str, Any]:
    head = {"name": tensor.name, "datatype": DATATYPES[tensor.values.dtype.kind], "shape": list(tensor.values.shape)}
    if binary is not None:
        return {**head, "parameters": {BINARY_SIZE: len(binary)}}
    return {**head, "data": tensor.values.ravel().tolist()}


def _write_binary(values: NDArray[Any]) -> bytes:
    """Little-endian and row by row; each string with its length before it."""
    if values.dtype.kind != "O":
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [text.encode() for text in values.ravel()]
    return b"".join(LENGTH.pack(len(text)) + text for text in texts)
