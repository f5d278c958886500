"""Envelope: reads the JSON of a request, whatever its size, without building what is too large.

The parsers of Python's library and of pydantic would make an object, or even an error, of each of ten million numbers.
Here a member stays text until it is known to be small. The data of a tensor stays text: `app.api.v2.tensors` reads it.
"""

import codecs
import json
import math
import re
from typing import Any, NoReturn

import msgspec
from msgspec import Raw, Struct
from pydantic import ValidationError

from app.api.v2.messages import InferRequest
from app.errors import MalformedTensor, echo

# Of each member but `data`. Real ones have some hundred.
MAX_MEMBER_BYTES = 64_000
# Above this, an error is described by msgspec, which stops at it, but knows less about it.
MAX_EXPLAINED_BYTES = 128_000
MAX_DIGITS = 20
CHUNK_BYTES = 64_000
# "Expected `object`, got `int` - at `$.inputs[0]`"
EXPECTATION = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?")
ABSENT = Raw()


class TensorMembers(Struct):
    """Each member as text; absent ones are empty. Unknown ones are skipped: the protocol allows extensions."""

    name: Raw = ABSENT
    shape: Raw = ABSENT
    datatype: Raw = ABSENT
    parameters: Raw = ABSENT
    data: Raw = ABSENT


class RequestMembers(Struct):
    id: Raw = ABSENT
    parameters: Raw = ABSENT
    inputs: tuple[TensorMembers] | None = None
    outputs: Raw = ABSENT


DECODER = msgspec.json.Decoder(RequestMembers)


def read_envelope(data: bytes) -> InferRequest:
    """Read a request. The data of its tensor is JSON text, or None.

    Raises: MalformedTensor.
    """
    _require_utf8(data)
    try:
        members = _split(data)
    except MalformedTensor:
        if len(data) <= MAX_EXPLAINED_BYTES:
            _explain(data)
        raise
    document = _read_members(members, "id", "parameters", "outputs")
    if members.inputs is not None:
        (tensor,) = members.inputs
        document["inputs"] = [_read_members(tensor, "name", "shape", "datatype", "parameters", path="inputs[0].")]
        text = bytes(tensor.data)
        document["inputs"][0]["data"] = None if text in (b"", b"null") else text
    return _validate(document)


def _require_utf8(data: bytes) -> None:
    """Check in parts, so that other threads can run in between."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(data)
    at = 0
    try:
        for at in range(0, len(data), CHUNK_BYTES):
            decoder.decode(view[at : at + CHUNK_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at += error.start
        raise MalformedTensor(f"Invalid JSON: not UTF-8, {error.reason} at about byte {at}.") from error


def _split(data: bytes) -> RequestMembers:
    try:
        return DECODER.decode(data)
    except msgspec.ValidationError as error:
        raise MalformedTensor(f"Invalid request: {_describe(error)}") from error
    except msgspec.DecodeError as error:
        raise MalformedTensor(f"Invalid JSON: {str(error).removeprefix('JSON is malformed: ')}.") from error
    except RecursionError as error:
        raise MalformedTensor("Invalid JSON: nested too deeply.") from error


def _explain(data: bytes) -> None:
    """Raises: MalformedTensor, if the error is one that the other parsers describe in more detail."""
    inputs = _validate(read_json(data)).inputs
    if len(inputs) != 1:
        raise MalformedTensor(f"inputs has {len(inputs)} tensors; expected one.")


def _describe(error: msgspec.ValidationError) -> str:
    match = EXPECTATION.fullmatch(str(error))
    what, path = match.groups() if match else (str(error), None)
    return f"{echo(path or 'body')}: {what}."


def _read_members(members: Struct, *names: str, path: str = "") -> dict[str, Any]:
    """Parse those members that are present."""
    texts = {name: bytes(getattr(members, name)) for name in names}
    return {name: _read_member(text, path + name) for name, text in texts.items() if text}


def _read_member(text: bytes, path: str) -> Any:
    if len(text) > MAX_MEMBER_BYTES:
        detail = f"Invalid request: {path} has {len(text)} bytes of JSON; the limit is {MAX_MEMBER_BYTES}."
        raise MalformedTensor(detail)
    return read_json(text)


def read_json(data: bytes) -> Any:
    """Parse a small document according to RFC 8259, which excludes NaN.

    Raises: MalformedTensor.
    """
    try:
        # As text: of bytes, the parser would guess the encoding.
        text = data.decode("utf-8")
        return json.loads(text, parse_int=_read_integer, parse_float=_read_fraction, parse_constant=_refuse_number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedTensor(f"Invalid JSON: {error}.") from error
    except RecursionError as error:
        raise MalformedTensor("Invalid JSON: nested too deeply.") from error


def _read_integer(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _refuse_number(text)


def _read_fraction(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise MalformedTensor(f"Invalid JSON: unsupported number {echo(text)}.")


def _validate(document: Any) -> InferRequest:
    try:
        return InferRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        value = "" if first["type"] == "missing" else f"={echo(repr(first['input']))}"
        raise MalformedTensor(f"Invalid request: {echo(path) or 'body'}{value}: {first['msg']}.") from error
