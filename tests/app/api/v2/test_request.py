import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.v2.request import InferenceRequest, parse_request
from app.errors import InvalidParameter, MalformedTensor, ServiceError, TooManyFiles, UnknownParameter
from app.store.catalogue import Catalogue, ServedModel
from tests.app.api.v2.requests import (
    PNG,
    binary_input,
    frame,
    image_input,
    make_pixels,
    pixel_input,
    with_length,
)

MAX_IMAGES = 4
# Maximum length of an error, for any client input.
MAX_TEXT = 700
EVERY = ("logits", "probabilities", "label", "tokens", "gmacs")
lasting = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def model(catalogue: Catalogue) -> ServedModel:
    return catalogue.find("tiny", None)


def parse(model: ServedModel, body: bytes, headers: dict[str, str] | None = None) -> InferenceRequest:
    return parse_request(body, next(iter((headers or {}).values()), None), model, MAX_IMAGES)


def parse_json(model: ServedModel, document: Any) -> InferenceRequest:
    return parse(model, json.dumps(document).encode())


def assert_images(request: InferenceRequest, expected: Any) -> None:
    assert len(request.images) == len(expected)
    for image, wanted in zip(request.images, expected, strict=True):
        np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize("n_images", [1, 3])
def test_pixels_are_equal_in_every_format(model: ServedModel, n_images: int) -> None:
    pixels = make_pixels(n_images)
    flat, nested = pixel_input(pixels), pixel_input(pixels, data=pixels.tolist())
    for tensor in (flat, nested):
        assert_images(parse_json(model, {"inputs": [tensor]}), pixels)
    body, headers = frame(binary_input(pixels.tobytes(), shape=list(pixels.shape)), pixels.tobytes())
    request = parse(model, body, headers)
    assert_images(request, pixels)
    assert all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in request.images)


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_are_equal_in_every_format(model: ServedModel, shape: list[int]) -> None:
    files = [PNG, b"\x00\xff"]
    texts = [base64.b64encode(data).decode() for data in files]
    flat = image_input(shape, data=texts)
    nested = image_input(shape, data=texts if len(shape) == 1 else [[text] for text in texts])
    for tensor in (flat, nested):
        assert list(parse_json(model, {"inputs": [tensor]}).images) == files
    binary = with_length(*files)
    body, headers = frame(image_input(shape, parameters={"binary_data_size": len(binary)}), binary)
    assert list(parse(model, body, headers).images) == files


def test_raw_request_is_one_file(model: ServedModel) -> None:
    request = parse(model, PNG, {"length": "0"})
    assert list(request.images) == [PNG]
    assert [output.output.name for output in request.outputs] == list(EVERY)


def summarize_outputs(request: InferenceRequest) -> list[tuple[str, bool, int | None]]:
    return [(output.output.name, output.is_binary, output.n_classes) for output in request.outputs]


def test_request_without_outputs_gets_all(model: ServedModel) -> None:
    nothing: list[dict[str, Any]] = [{}, {"outputs": []}, {"outputs": None}]
    for outputs in nothing:
        request = parse_json(model, {"inputs": [pixel_input(make_pixels())], **outputs})
        assert summarize_outputs(request) == [(name, False, None) for name in EVERY]
    request = parse_json(
        model, {"inputs": [pixel_input(make_pixels())], "parameters": {"binary_data_output": True, "r": 16}}
    )
    assert all(output.is_binary for output in request.outputs)
    assert (request.query.r, request.query.model, request.query.version) == ("16", "tiny", "1")


def test_each_output_follows_its_own_parameters(model: ServedModel) -> None:
    outputs = [
        {"name": "label", "parameters": {"binary_data": False}},
        {"name": "logits", "parameters": {"classification": 2}},
        {"name": "gmacs"},
    ]
    document = {"id": "7", "inputs": [pixel_input(make_pixels())], "outputs": outputs}
    request = parse_json(model, {**document, "parameters": {"binary_data_output": True}})
    assert request.id == "7"
    assert summarize_outputs(request) == [("label", False, None), ("logits", True, 2), ("gmacs", True, None)]


PIXELS = make_pixels()


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ([], "valid dictionary"),
        ({}, "inputs: Field required"),
        ({"inputs": []}, "inputs has 0 tensors; expected one"),
        ({"inputs": [pixel_input(PIXELS)] * 2}, "inputs has 2 tensors; expected one"),
        ({"inputs": [{}]}, r"inputs\[0\]\.name: Field required"),
        ({"inputs": [pixel_input(PIXELS, name="x")]}, "Unknown input 'x'"),
        ({"inputs": [pixel_input(PIXELS)], "id": 7}, "id=7: Input should be a valid string"),
        ({"inputs": [pixel_input(PIXELS, datatype="FP32")]}, "expected datatype UINT8, got 'FP32'"),
        ({"inputs": [pixel_input(PIXELS, datatype=None)]}, r"inputs\[0\]\.datatype=None"),
        ({"inputs": [pixel_input(PIXELS, shape=[1, 8, 8])]}, r"expected shape \[images, 8, 8, 3\], got \[1, 8, 8\]"),
        ({"inputs": [pixel_input(PIXELS, shape=[1, 3, 8, 8])]}, r"expected shape \[images, 8, 8, 3\], got \["),
        ({"inputs": [pixel_input(PIXELS, shape=[])]}, r"expected shape \[images, 8, 8, 3\], got \["),
        ({"inputs": [pixel_input(PIXELS, shape=[0, 8, 8, 3])]}, "contains no image"),
        ({"inputs": [pixel_input(PIXELS, shape=[-1, 8, 8, 3])]}, "contains no image"),
        ({"inputs": [pixel_input(PIXELS, shape=[1.0, 8, 8, 3])]}, r"shape\[0\]=1.0: Input should be a valid integer"),
        ({"inputs": [pixel_input(PIXELS, shape=[True, 8, 8, 3])]}, r"shape\[0\]=True: Input should be a valid integer"),
        ({"inputs": [pixel_input(PIXELS, shape=[2, 8, 8, 3])]}, "requires 384 values, got 192"),
        ({"inputs": [pixel_input(PIXELS, data=[1, 2])]}, "requires 192 values, got 2"),
        ({"inputs": [pixel_input(PIXELS, data=None)]}, "neither data nor binary_data_size"),
        ({"inputs": [pixel_input(PIXELS, data={})]}, r"data must be flat, or nested as shape \[1, 8, 8, 3\]"),
        ({"inputs": [pixel_input(PIXELS, data="abc")]}, r"data must be flat, or nested as shape \[1, 8, 8, 3\]"),
        (
            {"inputs": [pixel_input(PIXELS, data=PIXELS.reshape(1, 64, 3).tolist())]},
            r"data must be flat, or nested as shape \[1, 8, 8, 3\]",
        ),
        (
            {"inputs": [pixel_input(PIXELS, data=[PIXELS.ravel().tolist(), 7])]},
            r"data must be flat, or nested as shape \[1, 8, 8, 3\]",
        ),
        ({"inputs": [pixel_input(PIXELS, data=[256] * 192)]}, "data has values outside 0 to 255"),
        ({"inputs": [pixel_input(PIXELS, data=[-1] * 192)]}, "data has values outside 0 to 255"),
        ({"inputs": [pixel_input(PIXELS, data=[10**18] * 192)]}, "data has values outside 0 to 255"),
        (
            {"inputs": [pixel_input(PIXELS, data=[0.5] * 192)]},
            "data must contain only integers, found floating-point numbers",
        ),
        ({"inputs": [pixel_input(PIXELS, data=[1] * 191 + [True])]}, "found booleans"),
        ({"inputs": [pixel_input(PIXELS, data=[1] * 191 + [None])]}, "found nulls"),
        ({"inputs": [pixel_input(PIXELS, data=["1"] * 192)]}, "found strings"),
        ({"inputs": [image_input([1], data=[5])]}, "data must contain only base64 strings, found integers"),
        ({"inputs": [image_input([1], data=["%%%"])]}, r"data\[0\] is not valid base64: "),
        ({"inputs": [image_input([1], data=["ü"])]}, r"data\[0\] is not valid base64: "),
        ({"inputs": [image_input([2], data=["aGk="])]}, "does not match the number of elements, 1"),
        ({"inputs": [image_input([1, 2], data=["aGk="])]}, r"expected shape \[images\] or \[images, 1\], got"),
        ({"inputs": [image_input([], data=["aGk="])]}, r"expected shape \[images\] or \[images, 1\], got"),
        ({"inputs": [image_input([1], data=["aGk="], datatype="UINT8")]}, "expected datatype BYTES, got 'UINT8'"),
        ({"inputs": [pixel_input(PIXELS)], "outputs": [{"name": "x"}]}, "Unknown output 'x'"),
        ({"inputs": [pixel_input(PIXELS)], "outputs": [{"name": "label"}] * 2}, "Duplicate output 'label'"),
        ({"inputs": [pixel_input(PIXELS)], "outputs": [{}]}, r"outputs\[0\]\.name: Field required"),
        ({"inputs": [pixel_input(PIXELS)], "parameters": []}, r"parameters=\[\]: Input should be a valid dictionary"),
        ({"inputs": [binary_input(b"x")]}, "binary_data_size is 1, but 0 bytes follow the JSON"),
        ({"inputs": [binary_input(b"", parameters={"binary_data_size": -1})]}, "is not a non-negative integer"),
        ({"inputs": [binary_input(b"", parameters={"binary_data_size": True})]}, "is not a non-negative integer"),
        ({"inputs": [pixel_input(PIXELS, parameters={"binary_data_size": 192})]}, "has both data and binary"),
    ],
)
def test_malformed_request_is_refused_by_name(model: ServedModel, document: Any, reason: str) -> None:
    with pytest.raises(MalformedTensor, match=reason) as caught:
        parse_json(model, document)
    assert len(str(caught.value)) < MAX_TEXT


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"parameters": {"rate": 1}}, UnknownParameter, "Unknown parameter 'rate'"),
        ({"outputs": [{"name": "label", "parameters": {"x": 1}}]}, UnknownParameter, "unknown parameter 'x'"),
        (
            {"outputs": [{"name": "label", "parameters": {"classification": 1}}]},
            InvalidParameter,
            "'label' does not support classification",
        ),
        ({"outputs": [{"name": "logits", "parameters": {"classification": 4}}]}, InvalidParameter, "from 1 to 3"),
        ({"outputs": [{"name": "logits", "parameters": {"classification": 0}}]}, InvalidParameter, "from 1 to 3"),
        ({"outputs": [{"name": "logits", "parameters": {"classification": "1"}}]}, InvalidParameter, "from 1 to 3"),
        ({"outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]}, InvalidParameter, "neither true nor"),
        ({"parameters": {"binary_data_output": "yes"}}, InvalidParameter, "neither true nor false"),
        ({"inputs": [pixel_input(PIXELS, shape=[10**12, 8, 8, 3])]}, TooManyFiles, "images exceed the limit of 4"),
        ({"inputs": [image_input([5], data=["aGk="] * 5)]}, TooManyFiles, "5 images exceed the limit of 4"),
        (
            {"inputs": [pixel_input(PIXELS, data=None, parameters={"shared_memory_region": "x"})]},
            UnknownParameter,
            "unknown parameter 'shared_memory_region'",
        ),
    ],
)
def test_invalid_parameter_is_refused_by_name(
    model: ServedModel, changes: dict[str, Any], error: type[ServiceError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        parse_json(model, {"inputs": [pixel_input(PIXELS)], **changes})


@pytest.mark.parametrize(
    ("binary", "size", "reason"),
    [
        (with_length(PNG) + b"x", None, "ends within the length of element 1"),
        (with_length(PNG)[:-1], None, "but only .* remain"),
        (b"\xff\xff\xff\xff", None, "declares 4294967295 bytes, but only 0 remain"),
        (b"\x01", None, "ends within the length of element 0"),
        (b"", None, "does not match the number of elements, 0"),
        (with_length(PNG, PNG), None, "does not match the number of elements, 2"),
        (with_length(PNG, *[b""] * 1000), None, "does not match the number of elements, 2"),
        (with_length(PNG), 3, "binary_data_size is 3, but"),
        (with_length(PNG), 10**6, "binary_data_size is 1000000, but"),
        (with_length(PNG) + b"trailing", len(with_length(PNG)), "bytes follow the JSON"),
    ],
)
def test_binary_files_with_wrong_lengths_are_refused(
    model: ServedModel, binary: bytes, size: int | None, reason: str
) -> None:
    parameters = {"binary_data_size": len(binary) if size is None else size}
    body, headers = frame(image_input([1], parameters=parameters), binary)
    with pytest.raises(MalformedTensor, match=reason):
        parse(model, body, headers)


@pytest.mark.parametrize("n_bytes", [0, 191, 193])
def test_binary_pixels_with_wrong_length_are_refused(model: ServedModel, n_bytes: int) -> None:
    body, headers = frame(binary_input(bytes(n_bytes)), bytes(n_bytes))
    with pytest.raises(MalformedTensor, match=f"requires 192 values, got {n_bytes}"):
        parse(model, body, headers)


@pytest.mark.parametrize("length", ["-1", "x", "1.0", "", "+1", "01", "9" * 30, "1000000", " 1", "１"])
def test_invalid_header_length_is_refused(model: ServedModel, length: str) -> None:
    with pytest.raises(MalformedTensor, match="is not an integer from 0 to 192, the body size"):
        parse(model, bytes(192), {"length": length})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Invalid JSON: "),
        (b"{", "Invalid JSON: "),
        (b"\xff\xfe{}", "Invalid JSON: not UTF-8, "),
        (b"\xef\xbb\xbf{}", "Invalid JSON: "),
        (b'{"inputs": NaN}', "unsupported number NaN"),
        (b'{"inputs": -Infinity}', "unsupported number -Infinity"),
        (b'{"inputs": 1e999}', "unsupported number 1e999"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "unsupported number 9999"),
        (b"[" * 100_000, "Invalid JSON: nested too deeply"),
        (b'{"inputs": "\\ud800"}', "valid list"),
        (b'{"inputs": [{"name": "\\ud800", "shape": [], "datatype": ""}]}', "Invalid JSON: "),
    ],
)
def test_invalid_json_is_refused(model: ServedModel, body: bytes, reason: str) -> None:
    with pytest.raises(MalformedTensor, match=reason) as caught:
        parse(model, body)
    assert len(str(caught.value)) < MAX_TEXT


@lasting
@given(body=st.binary(max_size=400), length=st.one_of(st.none(), st.text(max_size=5), st.integers().map(str)))
def test_arbitrary_bytes_give_a_request_or_a_service_error(model: ServedModel, body: bytes, length: str | None) -> None:
    assert_request_or_service_error(model, body, length)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
TENSORS = st.fixed_dictionaries(
    {"name": st.sampled_from(["pixels", "image", "x"]), "datatype": st.sampled_from(["UINT8", "BYTES", "FP32"])},
    optional={
        "shape": st.lists(st.integers(-2, 9), max_size=5) | st.just([1, 8, 8, 3]) | JSON_VALUES,
        "data": st.lists(st.integers(-1, 256), max_size=5) | st.just([0] * 192) | JSON_VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(0, 300) | JSON_VALUES}) | JSON_VALUES,
    },
)
ENVELOPES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, min_size=1, max_size=1) | JSON_VALUES},
    optional={"id": JSON_VALUES, "parameters": JSON_VALUES, "outputs": JSON_VALUES},
)


@lasting
@given(document=ENVELOPES, binary=st.binary(max_size=200) | st.just(bytes(192)), is_framed=st.booleans())
def test_arbitrary_json_gives_a_request_or_a_service_error(
    model: ServedModel, document: Any, binary: bytes, is_framed: bool
) -> None:
    head = json.dumps(document).encode()
    assert_request_or_service_error(model, head + binary, str(len(head)) if is_framed else None)


@lasting
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_gives_a_request_or_a_service_error(model: ServedModel, place: int, byte: int) -> None:
    binary = with_length(PNG)
    body, headers = frame(image_input([1], parameters={"binary_data_size": len(binary)}), binary)
    place %= len(body)
    changed = body[:place] + bytes([byte]) + body[place + 1 :]
    assert_request_or_service_error(model, changed, next(iter(headers.values())))


def assert_request_or_service_error(model: ServedModel, body: bytes, length: str | None) -> None:
    try:
        request = parse_request(body, length, model, MAX_IMAGES)
    except ServiceError as error:
        assert 0 < len(error.detail) < MAX_TEXT  # noqa: PT017 (either way is fine)
    else:
        assert 1 <= len(request.images) <= MAX_IMAGES
