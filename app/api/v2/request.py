"""Request: parses an inference request to images, a query and the requested outputs. Pure functions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.v2.envelope import read_envelope
from app.api.v2.messages import RequestOutput
from app.api.v2.outputs import OutputTensor, list_outputs
from app.api.v2.parameters import BINARY_OUTPUT, read_flag, read_query
from app.api.v2.tensors import InputRule, read_images
from app.backends import Pixels
from app.errors import InvalidParameter, MalformedTensor, UnknownParameter, echo
from app.store.catalogue import ServedModel
from app.store.manifest import Manifest
from app.store.selection import Query

HEADER_LENGTH = "Inference-Header-Content-Length"
# Parameters of a requested output.
BINARY, CLASSIFICATION = "binary_data", "classification"
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class RequestedOutput:
    """n_classes: with Triton's `classification`, the number of classes to return instead of the tensor."""

    output: OutputTensor
    is_binary: bool
    n_classes: int | None = None


@dataclass(frozen=True)
class InferenceRequest:
    id: str | None
    images: Sequence[bytes | Pixels]
    query: Query
    outputs: tuple[RequestedOutput, ...]


def parse_request(body: bytes, header_length: str | None, model: ServedModel, max_images: int) -> InferenceRequest:
    """Parse a decompressed request body.

    header_length: the header with the length of the JSON, if the body also has binary data.
    Raises: MalformedTensor, TooManyFiles, UnknownParameter, InvalidParameter.
    """
    n_json = measure_json(body, header_length)
    manifest = model.manifest
    if header_length is not None and n_json == 0:
        # A raw request of the binary extension: the body is one element.
        return _wrap_file(body, manifest)
    envelope = read_envelope(body[:n_json])
    parameters = envelope.parameters or {}
    return InferenceRequest(
        envelope.id,
        read_images(envelope.inputs[0], memoryview(body)[n_json:], InputRule(manifest.input, max_images)),
        read_query(parameters, manifest.name, manifest.version),
        read_outputs(envelope.outputs, manifest, read_flag(parameters, BINARY_OUTPUT, default=False)),
    )


def measure_json(body: bytes, header_length: str | None) -> int:
    """Return the number of bytes of JSON in a body: all of them without the header.

    Raises: MalformedTensor.
    """
    if header_length is None:
        return len(body)
    if not WHOLE_NUMBER.fullmatch(header_length) or int(header_length) > len(body):
        detail = f"{HEADER_LENGTH}: {echo(header_length)} is not an integer from 0 to {len(body)}, the body size."
        raise MalformedTensor(detail)
    return int(header_length)


def _wrap_file(body: bytes, manifest: Manifest) -> InferenceRequest:
    query = read_query({}, manifest.name, manifest.version)
    return InferenceRequest(None, [body], query, read_outputs(None, manifest, is_binary=False))


def read_outputs(
    requested: Sequence[RequestOutput] | None, manifest: Manifest, is_binary: bool
) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs; all outputs if none are requested, as the protocol requires.

    Raises: MalformedTensor, UnknownParameter, InvalidParameter.
    """
    known = {output.name: output for output in list_outputs(manifest)}
    if not requested:
        return tuple(RequestedOutput(output, is_binary) for output in known.values())
    for index, output in enumerate(requested):
        if output.name not in known:
            raise MalformedTensor(f"Unknown output {echo(output.name)!r}.", accepted=list(known))
        if output.name in [other.name for other in requested[:index]]:
            raise MalformedTensor(f"Duplicate output {output.name!r}.")
    return tuple(_read_output(output, known, manifest, is_binary) for output in requested)


def _read_output(
    output: RequestOutput, known: Mapping[str, OutputTensor], manifest: Manifest, is_binary: bool
) -> RequestedOutput:
    parameters = output.parameters or {}
    for name in parameters:
        if name not in (BINARY, CLASSIFICATION):
            detail = f"Output {output.name!r}: unknown parameter {echo(name)!r}."
            raise UnknownParameter(detail, field=echo(name), accepted=[BINARY, CLASSIFICATION])
    n_classes = parameters.get(CLASSIFICATION)
    if n_classes is not None:
        _require_classes(known[output.name], n_classes, known, manifest)
    return RequestedOutput(known[output.name], read_flag(parameters, BINARY, is_binary), n_classes)


def _require_classes(
    output: OutputTensor, n_classes: Any, known: Mapping[str, OutputTensor], manifest: Manifest
) -> None:
    if not output.is_classifiable:
        detail = f"Output {output.name!r} does not support classification."
        accepted = [other.name for other in known.values() if other.is_classifiable]
        raise InvalidParameter(detail, field=CLASSIFICATION, accepted=accepted)
    n_labels = len(manifest.labels)
    if type(n_classes) is not int or not 1 <= n_classes <= n_labels:
        value = echo(repr(n_classes))
        detail = f"Output {output.name!r}: classification={value} is not an integer from 1 to {n_labels}."
        raise InvalidParameter(detail, field=CLASSIFICATION, value=value)
