"""Requests: builds inference requests, valid and invalid, without a client library."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.app.odd_images import encode, make_photo
from tests.app.tiny_store import SIDE

PATH = "/v2/models/tiny/infer"
LENGTH_HEADER = "Inference-Header-Content-Length"
PNG = encode(make_photo(SIDE, SIDE), "PNG")


def make_pixels(n_images: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n_images, SIDE, SIDE, 3), np.uint8)


def pixel_input(pixels: NDArray[np.uint8], **changes: Any) -> dict[str, Any]:
    head = {"name": "pixels", "shape": list(pixels.shape), "datatype": "UINT8"}
    return {**head, "data": pixels.ravel().tolist(), **changes}


def binary_input(data: bytes, **changes: Any) -> dict[str, Any]:
    head = {"name": "pixels", "shape": [1, SIDE, SIDE, 3], "datatype": "UINT8"}
    return {**head, "parameters": {"binary_data_size": len(data)}, **changes}


def image_input(shape: list[int], **changes: Any) -> dict[str, Any]:
    return {"name": "image", "shape": shape, "datatype": "BYTES", **changes}


def with_length(*elements: bytes) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def frame(tensor: dict[str, Any], binary: bytes = b"", **envelope: Any) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request with binary data, and its headers."""
    head = json.dumps({"inputs": [tensor], **envelope}).encode()
    return head + binary, {LENGTH_HEADER: str(len(head))}
