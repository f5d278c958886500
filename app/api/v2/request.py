"""Request: the bytes of an inference request become images, a query and the outputs that are wanted. Pure functions."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from app.api.v2.messages import InferRequest, RequestOutput
from app.api.v2.outputs import OutputTensor, list_outputs
from app.api.v2.parameters import BINARY_OUTPUT, read_flag, read_query
from app.api.v2.tensors import InputRule, read_images
from app.backends import Pixels
from app.errors import InvalidParameter, MalformedTensor, UnknownParameter, echo
from app.store.catalogue import ServedModel
from app.store.manifest import Manifest
from app.store.selection import Query

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY, CLASSIFICATION = "binary_data", "classification"  # parameters of a requested output
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
MAX_DIGITS = 20


@dataclass(frozen=True)
class WantedOutput:
    """n_classes: with Triton's `classification`, how many classes to return instead of the tensor."""

    output: OutputTensor
    is_binary: bool
    n_classes: int | None = None


@dataclass(frozen=True)
class InferenceRequest:
    id: str | None
    images: Sequence[bytes | Pixels]
    query: Query
    outputs: tuple[WantedOutput, ...]


def parse_request(body: bytes, header_length: str | None, model: ServedModel, max_images: int) -> InferenceRequest:
    """Read a request's body, which is not compressed any more.

    header_length: the header that says where the JSON ends and binary data begins, if there is one.
    Raises: MalformedTensor, TooManyFiles, UnknownParameter, InvalidParameter.
    """
    n_json = measure_json(body, header_length)
    manifest = model.manifest
    if header_length is not None and n_json == 0:  # the binary extension's raw request: the body is one element
        return _wrap_file(body, manifest)
    envelope = _read_envelope(_read_json(body[:n_json]))
    if len(envelope.inputs) != 1:
        accepted = [manifest.input.name, "image"]
        raise MalformedTensor(f"inputs has {len(envelope.inputs)} tensors; give one.", accepted=accepted)
    parameters = envelope.parameters or {}
    return InferenceRequest(
        envelope.id,
        read_images(envelope.inputs[0], memoryview(body)[n_json:], InputRule(manifest.input, max_images)),
        read_query(parameters, manifest.name, manifest.version),
        read_outputs(envelope.outputs, manifest, read_flag(parameters, BINARY_OUTPUT, default=False)),
    )


def measure_json(body: bytes, header_length: str | None) -> int:
    """Return how many bytes of a body are JSON: all, if no header says otherwise.

    Raises: MalformedTensor.
    """
    if header_length is None:
        return len(body)
    if not WHOLE_NUMBER.fullmatch(header_length) or int(header_length) > len(body):
        detail = f"{HEADER_LENGTH}: {echo(header_length)} is not a number of bytes from 0 to the body's {len(body)}."
        raise MalformedTensor(detail)
    return int(header_length)


def _wrap_file(body: bytes, manifest: Manifest) -> InferenceRequest:
    query = read_query({}, manifest.name, manifest.version)
    return InferenceRequest(None, [body], query, read_outputs(None, manifest, is_binary=False))


def _read_json(data: bytes) -> Any:
    """Read JSON as RFC 8259 has it, which knows no NaN.

    The hooks are Python, so that a thread that reads millions of numbers lets the others run.
    """
    try:
        return json.loads(
            data.decode("utf-8"), parse_int=_read_integer, parse_float=_read_fraction, parse_constant=_refuse_number
        )
    except UnicodeDecodeError as error:
        raise MalformedTensor(f"The JSON is not UTF-8: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise MalformedTensor(f"The JSON cannot be read: {error.msg} at character {error.pos}.") from error
    except RecursionError as error:
        raise MalformedTensor("The JSON is nested too deeply.") from error


def _read_integer(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _refuse_number(text)


def _read_fraction(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise MalformedTensor(f"The JSON has {echo(text)}, which is no number that is read here.")


def _read_envelope(document: Any) -> InferRequest:
    try:
        return InferRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        value = "" if first["type"] == "missing" else f" {echo(repr(first['input']))}"
        raise MalformedTensor(f"The request{place and ': ' + echo(place)}{value}: {first['msg']}.") from error


def read_outputs(
    wanted: Sequence[RequestOutput] | None, manifest: Manifest, is_binary: bool
) -> tuple[WantedOutput, ...]:
    """Return the outputs that are asked for; without any all that there are, as the protocol says.

    Raises: MalformedTensor, UnknownParameter, InvalidParameter.
    """
    known = {output.name: output for output in list_outputs(manifest)}
    if not wanted:
        return tuple(WantedOutput(output, is_binary) for output in known.values())
    for place, output in enumerate(wanted):
        if output.name not in known:
            raise MalformedTensor(f"There is no output {echo(output.name)!r}.", accepted=list(known))
        if output.name in [other.name for other in wanted[:place]]:
            raise MalformedTensor(f"outputs has {output.name!r} more than once.")
    return tuple(_read_output(output, known, manifest, is_binary) for output in wanted)


def _read_output(
    output: RequestOutput, known: Mapping[str, OutputTensor], manifest: Manifest, is_binary: bool
) -> WantedOutput:
    parameters = output.parameters or {}
    for name in parameters:
        if name not in (BINARY, CLASSIFICATION):
            detail = f"Output {output.name!r}: there is no parameter {echo(name)!r}."
            raise UnknownParameter(detail, field=echo(name), accepted=[BINARY, CLASSIFICATION])
    n_classes = parameters.get(CLASSIFICATION)
    if n_classes is not None:
        _require_classes(known[output.name], n_classes, known, manifest)
    return WantedOutput(known[output.name], read_flag(parameters, BINARY, is_binary), n_classes)


def _require_classes(
    output: OutputTensor, n_classes: Any, known: Mapping[str, OutputTensor], manifest: Manifest
) -> None:
    if not output.is_classifiable:
        detail = f"Output {output.name!r} cannot be answered as a classification."
        accepted = [other.name for other in known.values() if other.is_classifiable]
        raise InvalidParameter(detail, field=CLASSIFICATION, accepted=accepted)
    most = len(manifest.labels)
    if type(n_classes) is not int or not 1 <= n_classes <= most:
        detail = (
            f"Output {output.name!r}: classification={echo(repr(n_classes))} is not a whole number from 1 to {most}."
        )
        raise InvalidParameter(detail, field=CLASSIFICATION, value=echo(repr(n_classes)))
