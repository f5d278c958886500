"""Tensors: reads the input tensor of a request. Pure functions, which raise nothing but ServiceError.

A request has one of two inputs: pixels in the model's input size, or image files.
"""

import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

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
CHUNK = 100_000
KINDS = {
    dict: "objects",
    list: "arrays",
    str: "strings",
    int: "integers",
    float: "floating-point numbers",
    bool: "booleans",
    type(None): "nulls",
}
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
    data = _join_numbers(tensor) if binary is None else binary
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
    if len(files) != tensor.shape[0]:
        detail = f"{_name(tensor)}: shape {tensor.shape} does not match the number of elements, {len(files)}."
        raise MalformedTensor(detail)
    return list(files)


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


def _join_numbers(tensor: RequestInput) -> bytes:
    """Convert JSON numbers to bytes in chunks, so that other threads can run in between."""
    numbers = _flatten(tensor, int)
    try:
        return b"".join(bytes(numbers[start : start + CHUNK]) for start in range(0, len(numbers), CHUNK))
    except (ValueError, OverflowError) as error:
        raise MalformedTensor(f"{_name(tensor)}: data has values outside 0 to 255.") from error


def _decode_base64(tensor: RequestInput) -> list[bytes]:
    return [_decode_element(tensor, index, text) for index, text in enumerate(_flatten(tensor, str))]


def _decode_element(tensor: RequestInput, index: int, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        detail = f"{_name(tensor)}: data[{index}] is not valid base64: {error}."
        raise MalformedTensor(detail) from error


def _flatten(tensor: RequestInput, kind: type) -> list[Any]:
    """Return the elements in order. The data must be flat, or nested as the shape."""
    data: list[Any] = [tensor.data]
    is_nested = isinstance(tensor.data, list) and bool(tensor.data) and isinstance(tensor.data[0], list)
    for extent in tensor.shape if is_nested else [None]:
        if any(type(part) is not list or extent not in (None, len(part)) for part in data):
            raise MalformedTensor(f"{_name(tensor)}: data must be flat, or nested as shape {tensor.shape}.")
        data = list(chain.from_iterable(data))
    wrong = {type(element) for element in data} - {kind}
    if wrong:
        accepted = "integers" if kind is int else "base64 strings"
        raise MalformedTensor(f"{_name(tensor)}: data must contain only {accepted}, found {KINDS[wrong.pop()]}.")
    return data


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
