"""Tensors: reads the input tensor of a request. Pure functions, which raise nothing but ServiceError.

A request has one of two inputs: pixels in the model's input size, or image files.
"""

import binascii
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Annotated

import msgspec
import numpy as np

from app.api.v2.messages import RequestInput
from app.backends import Pixels
from app.errors import MalformedTensor, TooManyFiles, UnknownParameter, echo
from app.store.manifest import Input

IMAGE = "image"
PIXELS_DATATYPE = "UINT8"
IMAGE_DATATYPE = "BYTES"
CHANNELS = 3
BINARY_SIZE = "binary_data_size"
CHUNK_BYTES = 50_000
# By msgspec's names.
KINDS = {
    "object": "objects",
    "array": "arrays",
    "str": "strings",
    "int": "integers",
    "float": "floating-point numbers",
    "bool": "booleans",
    "null": "nulls",
}
GOT = re.compile(r"got `(\w+)`")
WHITESPACE = b" \t\r\n"
NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[],{}"')
NUMBERS = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=255)]])
TEXTS, NESTED_TEXTS = msgspec.json.Decoder(list[str]), msgspec.json.Decoder(list[tuple[str]])
# Precedes each element of a BYTES tensor.
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class InputRule:
    rule: Input
    max_images: int


def read_images(tensor: RequestInput, binary: memoryview, expected: InputRule) -> Sequence[bytes | Pixels]:
    """Return the images of a tensor.

    binary: the bytes after the JSON.
    Raises: MalformedTensor, TooManyFiles, UnknownParameter.
    """
    if tensor.name not in (expected.rule.name, IMAGE):
        accepted = [expected.rule.name, IMAGE]
        raise MalformedTensor(f"Unknown input {echo(tensor.name)!r}.", accepted=accepted)
    size = read_binary_size(tensor)
    if size is not None and tensor.data is not None:
        raise MalformedTensor(f"{_name(tensor)} has both data and {BINARY_SIZE}; provide one of them.")
    if size is None and tensor.data is None:
        raise MalformedTensor(f"{_name(tensor)} has neither data nor {BINARY_SIZE}; provide one of them.")
    if (size or 0) != len(binary):
        detail = f"{_name(tensor)}: {BINARY_SIZE} is {size or 0}, but {len(binary)} bytes follow the JSON."
        raise MalformedTensor(detail)
    read = _read_files if tensor.name == IMAGE else _read_pixels
    return read(tensor, None if size is None else binary, expected)


def read_binary_size(tensor: RequestInput) -> int | None:
    """Raises: MalformedTensor, UnknownParameter."""
    parameters = tensor.parameters or {}
    for name in parameters:
        if name != BINARY_SIZE:
            detail = f"{_name(tensor)}: unknown parameter {echo(name)!r}."
            raise UnknownParameter(detail, field=echo(name), accepted=[BINARY_SIZE])
    size = parameters.get(BINARY_SIZE)
    if size is not None and (type(size) is not int or size < 0):
        raise MalformedTensor(f"{_name(tensor)}: {BINARY_SIZE}={echo(repr(size))} is not a non-negative integer.")
    return size


def _read_pixels(tensor: RequestInput, binary: memoryview | None, expected: InputRule) -> list[bytes | Pixels]:
    height, width = expected.rule.height, expected.rule.width
    wanted = f"[images, {height}, {width}, {CHANNELS}]"
    _require_datatype(tensor, PIXELS_DATATYPE)
    if tensor.shape[1:] != [height, width, CHANNELS]:
        raise MalformedTensor(f"{_name(tensor)}: expected shape {wanted}, got {echo(str(tensor.shape))}.")
    _require_count(tensor, expected)
    n_bytes = tensor.shape[0] * height * width * CHANNELS
    data = _join_numbers(tensor, n_bytes) if binary is None else binary
    if len(data) != n_bytes:
        raise MalformedTensor(f"{_name(tensor)}: shape {tensor.shape} requires {n_bytes} values, got {len(data)}.")
    return list(np.frombuffer(data, np.uint8).reshape(tensor.shape))


def _read_files(tensor: RequestInput, binary: memoryview | None, expected: InputRule) -> list[bytes | Pixels]:
    _require_datatype(tensor, IMAGE_DATATYPE)
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        detail = f"{_name(tensor)}: expected shape [images] or [images, 1], got {echo(str(tensor.shape))}."
        raise MalformedTensor(detail)
    _require_count(tensor, expected)
    files = _decode_base64(tensor) if binary is None else _split(tensor, binary)
    _require_elements(tensor, len(files))
    return list(files)


def _require_elements(tensor: RequestInput, n_elements: int) -> None:
    if n_elements != tensor.shape[0]:
        detail = f"{_name(tensor)}: shape {tensor.shape} does not match the number of elements, {n_elements}."
        raise MalformedTensor(detail)


def _require_datatype(tensor: RequestInput, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise MalformedTensor(f"{_name(tensor)}: expected datatype {datatype}, got {echo(tensor.datatype)!r}.")


def _require_count(tensor: RequestInput, expected: InputRule) -> None:
    n_images = tensor.shape[0]
    if n_images < 1:
        raise MalformedTensor(f"{_name(tensor)}: shape {echo(str(tensor.shape))} contains no image.")
    if n_images > expected.max_images:
        detail = f"{_name(tensor)}: {echo(str(n_images))} images exceed the limit of {expected.max_images}."
        raise TooManyFiles(detail, max_files=expected.max_images)


def _join_numbers(tensor: RequestInput, n_values: int) -> bytes:
    """Convert JSON numbers to bytes. Their number and nesting are checked on the text, before any is read."""
    text = tensor.data
    _require_array(tensor)
    if b'"' in text:
        raise _wrong_kind(tensor, "integers", "str")
    if text.count(b"[") > 1:
        _require_nested(tensor)
        text = text.translate(None, b"[]")
    else:
        text = text[1:-1]
    n_given = text.count(b",") + 1 if text.strip(WHITESPACE) else 0
    if n_given != n_values:
        raise MalformedTensor(f"{_name(tensor)}: shape {tensor.shape} requires {n_values} values, got {n_given}.")
    return b"".join(_read_chunk(tensor, chunk) for chunk in _cut(text))


def _require_array(tensor: RequestInput) -> None:
    if not tensor.data.startswith(b"["):
        raise _wrong_nesting(tensor)


def _require_nested(tensor: RequestInput) -> None:
    """Compare brackets and commas with those of the shape."""
    if tensor.data.count(b"[") != sum(accumulate(tensor.shape[:-1], mul, initial=1)):
        raise _wrong_nesting(tensor)
    wanted = b""
    for extent in reversed(tensor.shape):
        wanted = b"[" + b",".join([wanted] * extent) + b"]"
    if tensor.data.translate(None, NOT_STRUCTURE) != wanted:
        raise _wrong_nesting(tensor)


def _cut(text: bytes) -> Iterator[bytes]:
    """Cut a list at commas into parts that take a millisecond each, so that other threads can run in between."""
    start = 0
    while start <= len(text):
        end = text.find(b",", start + CHUNK_BYTES)
        end = len(text) if end < 0 else end
        yield b"[" + text[start:end] + b"]"
        start = end + 1


def _read_chunk(tensor: RequestInput, chunk: bytes) -> bytes:
    try:
        return bytes(NUMBERS.decode(chunk))
    except msgspec.ValidationError as error:
        raise _wrong_elements(tensor, "integers", error) from error


def _decode_base64(tensor: RequestInput) -> list[bytes]:
    return [_decode_element(tensor, index, text) for index, text in enumerate(_read_texts(tensor))]


def _read_texts(tensor: RequestInput) -> list[str]:
    """Return the strings. None of them is read if there are too many; base64 has no commas."""
    _require_array(tensor)
    if tensor.data.count(b",") >= max(1, tensor.shape[0]):
        _require_elements(tensor, tensor.data.count(b",") + 1)
    is_nested = len(tensor.shape) == 2 and tensor.data[1:].lstrip(WHITESPACE).startswith(b"[")
    try:
        return [text for (text,) in NESTED_TEXTS.decode(tensor.data)] if is_nested else TEXTS.decode(tensor.data)
    except msgspec.ValidationError as error:
        raise _wrong_elements(tensor, "base64 strings", error) from error


def _wrong_elements(tensor: RequestInput, accepted: str, error: msgspec.ValidationError) -> MalformedTensor:
    found = GOT.search(str(error))
    if found is None:
        return MalformedTensor(f"{_name(tensor)}: data has values outside 0 to 255.")
    return _wrong_nesting(tensor) if "`array`" in str(error) else _wrong_kind(tensor, accepted, found[1])


def _wrong_kind(tensor: RequestInput, accepted: str, found: str) -> MalformedTensor:
    return MalformedTensor(f"{_name(tensor)}: data must contain only {accepted}, found {KINDS[found]}.")


def _wrong_nesting(tensor: RequestInput) -> MalformedTensor:
    shape = echo(str(tensor.shape))
    return MalformedTensor(f"{_name(tensor)}: data must be flat, or nested as shape {shape}.")


def _decode_element(tensor: RequestInput, index: int, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        detail = f"{_name(tensor)}: data[{index}] is not valid base64: {error}."
        raise MalformedTensor(detail) from error


def _split(tensor: RequestInput, binary: memoryview) -> list[bytes]:
    """Split a BYTES tensor into its elements."""
    files: list[bytes] = []
    offset = 0
    while offset < len(binary) and len(files) <= tensor.shape[0]:
        if offset + LENGTH.size > len(binary):
            raise MalformedTensor(f"{_name(tensor)}: binary data ends within the length of element {len(files)}.")
        (length,) = LENGTH.unpack_from(binary, offset)
        offset += LENGTH.size
        if length > len(binary) - offset:
            detail = f"element {len(files)} declares {length} bytes, but only {len(binary) - offset} remain"
            raise MalformedTensor(f"{_name(tensor)}: {detail}.")
        files.append(bytes(binary[offset : offset + length]))
        offset += length
    return files


def _name(tensor: RequestInput) -> str:
    return f"Input {echo(tensor.name)!r}"
