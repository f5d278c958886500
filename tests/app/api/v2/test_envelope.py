import json
import tracemalloc

import numpy as np
import pytest

from app.api.v2.request import parse_request
from app.errors import MalformedTensor
from app.store.catalogue import Catalogue
from tests.app.api.v2.json_bombs import make_json_bombs
from tests.app.api.v2.requests import image_input, make_pixels, pixel_input

N_BYTES = 500_000
# Measured: at most 2.4 copies of the body. One object of each number would be 16 or more.
MAX_COPIES = 5
MAX_IMAGES = 4
PIXELS = make_pixels(2)


@pytest.mark.parametrize(("name", "body"), make_json_bombs(N_BYTES).items(), ids=lambda value: str(value)[:40])
def test_every_member_is_bounded_before_it_is_built(catalogue: Catalogue, name: str, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedTensor) as caught:
            parse_request(body, None, catalogue.find("tiny", None), MAX_IMAGES)
        assert tracemalloc.get_traced_memory()[1] < MAX_COPIES * N_BYTES
    finally:
        tracemalloc.stop()
    assert 0 < len(caught.value.detail) < 300


@pytest.mark.parametrize("indent", [None, 1, "\t"])
def test_data_may_have_any_white_space(catalogue: Catalogue, indent: int | str | None) -> None:
    model = catalogue.find("tiny", None)
    for data in (PIXELS.tolist(), PIXELS.ravel().tolist()):
        body = json.dumps({"inputs": [pixel_input(PIXELS, data=data)]}, indent=indent).replace("\n", "\r\n").encode()
        np.testing.assert_array_equal(parse_request(body, None, model, MAX_IMAGES).images, PIXELS)
    body = json.dumps({"inputs": [image_input([1, 1], data=[["aGk="]])]}, indent=indent).encode()
    assert list(parse_request(body, None, model, MAX_IMAGES).images) == [b"hi"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"[[[[", b"[[[[[", "Invalid JSON"),
        (b"], [", b"], [[], ", "flat, or nested as shape"),
        (b"], [", b", ", "flat, or nested as shape"),
        (b"]], [[", b"], [", "flat, or nested as shape"),
        (b"[[[[", b"[[[[null, ", "flat, or nested as shape"),
        (b"], [", b", 7], [", "flat, or nested as shape"),
        (b"[[[[", b"[[[[1", "values outside 0 to 255|Invalid JSON"),
        (b"[[[[", b"[[[[-", "values outside 0 to 255|Invalid JSON"),
        (b"[[[[", b"[[[[1.5, 2], [", "flat, or nested as shape"),
    ],
)
def test_data_nested_otherwise_than_its_shape_is_refused(
    catalogue: Catalogue, old: bytes, new: bytes, reason: str
) -> None:
    body = json.dumps({"inputs": [pixel_input(PIXELS, data=np.maximum(PIXELS, 100).tolist())]}).encode()
    with pytest.raises(MalformedTensor, match=reason):
        parse_request(body.replace(old, new, 1), None, catalogue.find("tiny", None), MAX_IMAGES)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (b"1e1", "found floating-point numbers"),
        (b"{}", "found objects"),
        (b"9" * 5000, "values outside 0 to 255|Invalid JSON"),
        (b"-1", "values outside 0 to 255"),
        (b"01", "Invalid JSON"),
        (b"", "Invalid JSON"),
    ],
)
def test_wrong_element_is_described(catalogue: Catalogue, element: bytes, reason: str) -> None:
    data = b"[" + b"0," * (PIXELS.size - 1) + element + b"]"
    body = json.dumps({"inputs": [pixel_input(PIXELS, data="DATA")]}).encode().replace(b'"DATA"', data)
    with pytest.raises(MalformedTensor, match=reason):
        parse_request(body, None, catalogue.find("tiny", None), MAX_IMAGES)


def test_a_large_file_is_read_in_any_form(catalogue: Catalogue) -> None:
    text = "aGk" + "A" * 400_001
    body = json.dumps({"id": "é", "inputs": [image_input([1], data=[text])]}, ensure_ascii=False).encode()
    request = parse_request(body, None, catalogue.find("tiny", None), MAX_IMAGES)
    assert request.id == "é"
    assert len(request.images[0]) == 300_003
