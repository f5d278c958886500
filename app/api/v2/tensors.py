"""Tensors: the images in a request, however they are written. Pure functions; whatever the bytes, only our own errors.

Two inputs, of which a request has one: pixels as the model reads them, or image files.
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
PIECE = 100_000
KINDS = {
    dict: "objects",
    list: "arrays",
    str: "strings",
    int: "whole numbers",
    float: "fractions",
    bool: "truth values",
    type(None): "nulls",
}
LENGTH = struct.Struct("<I")  # before each element of a BYTES tensor


@dataclass(frozen=True)
class InputRule:
    rule: Input
    max_images: int


def read_images(tensor: RequestInput, binary: memoryview, expected: InputRule) -> Sequence[bytes | Pixels]:
    """Return the images of a tensor.

    binary: what lies behind the JSON.
    Raises: MalformedTensor, TooManyFiles, UnknownParameter.
    """
    if tensor.name not in (expected.rule.name, IMAGE):
        accepted = [expected.rule.name, IMAGE]
        raise MalformedTensor(f"There is no input {echo(tensor.name)!r}.", accepted=accepted)
    size = read_binary_size(tensor)
    if size is not None and tensor.data is not None:
        raise MalformedTensor(f"{_name(tensor)} has both data and {BINARY_SIZE}; give one.")
    if size is None and tensor.data is None:
        raise MalformedTensor(f"{_name(tensor)} has neither data nor {BINARY_SIZE}.")
    if (size or 0) != len(binary):
        raise MalformedTensor(
            f"{_name(tensor)}: {BINARY_SIZE} is {size or 0}, but {len(binary)} bytes lie behind the JSON."
        )
    read = _read_files if tensor.name == IMAGE else _read_pixels
    return read(tensor, None if size is None else binary, expected)


def read_binary_size(tensor: RequestInput) -> int | None:
    """Raises: MalformedTensor, UnknownParameter."""
    parameters = tensor.parameters or {}
    for name in parameters:
        if name != BINARY_SIZE:
            detail = f"{_name(tensor)}: there is no parameter {echo(name)!r}."
            raise UnknownParameter(detail, field=echo(name), accepted=[BINARY_SIZE])
    size = parameters.get(BINARY_SIZE)
    if size is not None and (type(size) is not int or size < 0):
        raise MalformedTensor(f"{_name(tensor)}: {BINARY_SIZE}={echo(repr(size))} is not a number of bytes.")
    return size


def _read_pixels(tensor: RequestInput, binary: memoryview | None, expected: InputRule) -> list[bytes | Pixels]:
    height, width = expected.rule.height, expected.rule.width
    wanted = f"[images, {height}, {width}, {CHANNELS}]"
    _require_datatype(tensor, PIXELS_DATATYPE)
    if tensor.shape[1:] != [height, width, CHANNELS]:
        raise MalformedTensor(f"{_name(tensor)}: shape {echo(str(tensor.shape))} is not {wanted}.")
    _require_count(tensor, expected)
    n_bytes = tensor.shape[0] * height * width * CHANNELS
    data = _join_numbers(tensor) if binary is None else binary
    if len(data) != n_bytes:
        raise MalformedTensor(
            f"{_name(tensor)}: shape {tensor.shape} takes {n_bytes} numbers of one byte, but there are {len(data)}."
        )
    return list(np.frombuffer(data, np.uint8).reshape(tensor.shape))


def _read_files(tensor: RequestInput, binary: memoryview | None, expected: InputRule) -> list[bytes | Pixels]:
    _require_datatype(tensor, IMAGE_DATATYPE)
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        raise MalformedTensor(f"{_name(tensor)}: shape {echo(str(tensor.shape))} is neither [images] nor [images, 1].")
    _require_count(tensor, expected)
    files = _decode_base64(tensor) if binary is None else _split(tensor, binary)
    if len(files) != tensor.shape[0]:
        raise MalformedTensor(f"{_name(tensor)}: shape {tensor.shape}, but the data has {len(files)} elements.")
    return list(files)


def _require_datatype(tensor: RequestInput, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise MalformedTensor(f"{_name(tensor)}: datatype {echo(tensor.datatype)!r} is not {datatype}.")


def _require_count(tensor: RequestInput, expected: InputRule) -> None:
    n_images = tensor.shape[0]
    if n_images < 1:
        raise MalformedTensor(f"{_name(tensor)}: shape {echo(str(tensor.shape))} holds no image.")
    if n_images > expected.max_images:
        detail = f"{_name(tensor)}: {echo(str(n_images))} images are more than {expected.max_images}."
        raise TooManyFiles(detail, max_files=expected.max_images)


def _join_numbers(tensor: RequestInput) -> bytes:
    """Convert JSON numbers to bytes, in pieces, so that other threads can run in between."""
    numbers = _flatten(tensor, int)
    try:
        return b"".join(bytes(numbers[start : start + PIECE]) for start in range(0, len(numbers), PIECE))
    except (ValueError, OverflowError) as error:
        raise MalformedTensor(f"{_name(tensor)}: data has numbers that are not from 0 to 255.") from error


def _decode_base64(tensor: RequestInput) -> list[bytes]:
    return [_decode_element(tensor, place, text) for place, text in enumerate(_flatten(tensor, str))]


def _decode_element(tensor: RequestInput, place: int, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        detail = f"{_name(tensor)}: data[{place}] is not base64, as which JSON carries an image: {error}."
        raise MalformedTensor(detail) from error


def _flatten(tensor: RequestInput, kind: type) -> list[Any]:
    """Return the elements in order; the data is flat, or nested just as the shape says."""
    data: list[Any] = [tensor.data]
    is_nested = isinstance(tensor.data, list) and bool(tensor.data) and isinstance(tensor.data[0], list)
    for extent in tensor.shape if is_nested else [None]:
        if any(type(part) is not list or extent not in (None, len(part)) for part in data):
            raise MalformedTensor(f"{_name(tensor)}: data is neither flat nor nested as shape {tensor.shape}.")
        data = list(chain.from_iterable(data))
    wrong = {type(element) for element in data} - {kind}
    if wrong:
        accepted = "whole numbers" if kind is int else "strings of base64"
        raise MalformedTensor(f"{_name(tensor)}: data has {KINDS[wrong.pop()]}, and not only {accepted}.")
    return data


def _split(tensor: RequestInput, binary: memoryview) -> list[bytes]:
    """Cut a BYTES tensor into its elements."""
    files: list[bytes] = []
    place = 0
    while place < len(binary) and len(files) <= tensor.shape[0]:
        if place + LENGTH.size > len(binary):
            raise MalformedTensor(f"{_name(tensor)}: the data ends inside the length of element {len(files)}.")
        (length,) = LENGTH.unpack_from(binary, place)
        place += LENGTH.size
        if length > len(binary) - place:
            detail = f"element {len(files)} has {length} bytes by its length, but only {len(binary) - place} are left"
            raise MalformedTensor(f"{_name(tensor)}: {detail}.")
        files.append(bytes(binary[place : place + length]))
        place += length
    return files


def _name(tensor: RequestInput) -> str:
    return f"Input {echo(tensor.name)!r}"
