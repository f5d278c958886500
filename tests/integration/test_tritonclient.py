"""Runs `tritonclient` against a server process: code written for Triton works unchanged."""

import asyncio
import base64
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from tests.app.odd_images import encode, make_photo
from tests.app.tiny_store import LABELS, SIDE, expected_logits
from tests.integration.server import Address, Server, on_both, wait_until

PHOTO = make_photo(SIDE, SIDE)
PNG = encode(PHOTO, "PNG")
RATES = (0, 8, 16)
pytestmark = on_both


@pytest.fixture
def client(server: Address) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        yield client


def make_pixels(n_images: int = 2, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n_images, SIDE, SIDE, 3), np.uint8)


def pixel_input(pixels: NDArray[np.uint8], binary: bool = True) -> Any:
    tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    return tensor.set_data_from_numpy(pixels, binary_data=binary)


def image_input(*files: bytes, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    return tensor.set_data_from_numpy(np.array(files, dtype=np.object_), binary_data=binary)


def assert_logits(result: Any, pixels: NDArray[np.uint8], r: int = 8) -> None:
    np.testing.assert_allclose(result.as_numpy("logits"), expected_logits(pixels, r), rtol=1e-5)


def refusal(client: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(*arguments, **options)
    return caught.value.status(), caught.value.message()


def test_health_and_listing(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "dtem-serve"
    assert [(item["name"], item["state"]) for item in client.get_model_repository_index()] == [("tiny", "READY")]


def test_metadata_and_configuration(client: Any) -> None:
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"][0] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}
    assert client.get_model_metadata("tiny", "1") == metadata
    config = client.get_model_config("tiny")
    assert config["input"][0]["dims"] == [SIDE, SIDE, 3]
    assert client.get_model_config("tiny", "1") == config
    with pytest.raises(InferenceServerException, match="There is no model 'nope'"):
        client.get_model_metadata("nope")


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
def test_pixels_in_and_every_output_out(client: Any, binary_input: bool, binary_output: bool) -> None:
    pixels = make_pixels(3)
    names = ("logits", "probabilities", "label", "tokens", "gmacs")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_output) for name in names]
    result = client.infer("tiny", [pixel_input(pixels, binary_input)], outputs=outputs, parameters={"r": 16})
    assert_logits(result, pixels, 16)
    np.testing.assert_allclose(result.as_numpy("probabilities").sum(axis=1), 1, rtol=1e-5)
    labels = [text if isinstance(text, str) else text.decode() for text in result.as_numpy("label")]
    assert labels == [LABELS[place] for place in expected_logits(pixels, 16).argmax(axis=1)]
    assert result.as_numpy("tokens").tolist() == [[65, 49, 33]] * 3
    assert result.as_numpy("gmacs").dtype == np.float32
    assert result.get_response()["parameters"]["r"] == 16


@pytest.mark.parametrize("version", ["", "1"])
def test_without_outputs_all_are_returned_in_binary(client: Any, version: str) -> None:
    pixels = make_pixels()
    result = client.infer("tiny", [pixel_input(pixels)], model_version=version, request_id="request-1")
    assert_logits(result, pixels)
    answer = result.get_response()
    assert answer["id"] == "request-1"
    assert all(item["parameters"]["binary_data_size"] for item in answer["outputs"])
    assert len(answer["outputs"]) == len(client.get_model_metadata("tiny")["outputs"])


def test_image_files(client: Any) -> None:
    photos = [make_photo(SIDE, SIDE, seed) for seed in range(5)]
    result = client.infer("tiny", [image_input(*(encode(photo, "PNG") for photo in photos))], parameters={"r": 0})
    assert_logits(result, np.stack([np.asarray(photo) for photo in photos]), 0)


def test_image_file_in_json_is_base64(client: Any) -> None:
    result = client.infer("tiny", [image_input(base64.b64encode(PNG), binary=False)])
    assert_logits(result, np.asarray(PHOTO)[None])


def test_classification(client: Any) -> None:
    pixels = make_pixels(1)
    result = client.infer("tiny", [pixel_input(pixels)], outputs=[triton.InferRequestedOutput("logits", class_count=2)])
    value, place, label = result.as_numpy("logits")[0, 0].decode().split(":")
    logits = expected_logits(pixels, 8)[0]
    assert (int(place), label) == (logits.argmax(), LABELS[logits.argmax()])
    assert float(value) == pytest.approx(logits.max(), abs=1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_in_both_directions(client: Any, algorithm: str) -> None:
    pixels = make_pixels(4)
    result = client.infer(
        "tiny",
        [pixel_input(pixels)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert_logits(result, pixels)


def test_asynchronous_requests_get_their_own_results(client: Any) -> None:
    batches = [make_pixels(1 + seed % 3, seed) for seed in range(12)]
    pending = [
        client.async_infer("tiny", [pixel_input(pixels)], request_id=str(seed), parameters={"r": RATES[seed % 3]})
        for seed, pixels in enumerate(batches)
    ]
    for seed, (request, pixels) in enumerate(zip(pending, batches, strict=True)):
        result = request.get_result()
        assert result.get_response()["id"] == str(seed)
        assert_logits(result, pixels, RATES[seed % 3])


@pytest.mark.parametrize("algorithm", [None, "gzip"])
def test_asyncio_client(server: Address, algorithm: str | None) -> None:
    pixels = make_pixels(2)

    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_model_ready("tiny")
            return await client.infer("tiny", [pixel_input(pixels)], response_compression_algorithm=algorithm)

    assert_logits(asyncio.run(ask()), pixels)


def test_concurrent_clients_get_their_own_results(server: Address) -> None:
    def ask(seed: int) -> None:
        pixels = make_pixels(1, seed)
        # A client is not thread-safe.
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert_logits(client.infer("tiny", [pixel_input(pixels)], parameters={"r": 16}), pixels, 16)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))


def test_statistics_count_inferred_images(client: Any, server: Address) -> None:
    if not isinstance(server, Server):
        pytest.skip("each replica counts what it has inferred itself")

    def count() -> int:
        (stats,) = client.get_inference_statistics("tiny", "1")["model_stats"]
        return int(stats["inference_count"])

    before = count()
    client.infer("tiny", [pixel_input(make_pixels(3))])
    assert count() == before + 3
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "tiny"


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"parameters": {"r": 3}}, "422", "Accepted: 0, 8, 16"),
        ({"parameters": {"speed": 3}}, "422", "Unknown parameter 'speed'"),
        ({"model_version": "7"}, "404", "has no version '7'"),
        ({"priority": 1}, "422", "Unsupported parameter 'priority': "),
        ({"sequence_id": 5}, "422", "Unsupported parameter 'sequence_id': "),
        ({"outputs": [triton.InferRequestedOutput("nope")]}, "400", "Unknown output 'nope'"),
        ({"query_params": {"r": 8}}, "422", "Unknown parameter 'r'"),
    ],
)
def test_errors_name_the_problem(client: Any, options: dict[str, Any], status: str, words: str) -> None:
    found, message = refusal(client, "tiny", [pixel_input(make_pixels())], **options)
    assert found == status
    assert words in message
    # The connection is still usable.
    client.infer("tiny", [pixel_input(make_pixels())])


def test_tensor_errors_name_the_problem(client: Any) -> None:
    assert refusal(client, "nope", [image_input(PNG)])[0] == "404"
    status, message = refusal(client, "tiny", [image_input(PNG, b"text", PNG)])
    assert status == "415"
    assert message.startswith("Image 1: ")
    wide = pixel_input(np.zeros((1, SIDE, SIDE + 1, 3), np.uint8))
    assert refusal(client, "tiny", [wide]) == (
        "400",
        "Input 'pixels': expected shape [images, 8, 8, 3], got [1, 8, 9, 3].",
    )
    floats = triton.InferInput("pixels", [1, SIDE, SIDE, 3], "FP32")
    floats.set_data_from_numpy(np.zeros((1, SIDE, SIDE, 3), np.float32))
    assert "expected datatype UINT8, got 'FP32'" in refusal(client, "tiny", [floats])[1]
    shared = triton.InferInput("pixels", [1, SIDE, SIDE, 3], "UINT8")
    shared.set_shared_memory("region", 192)
    assert "shared_memory_region" in refusal(client, "tiny", [shared])[1]
    assert refusal(client, "tiny", [pixel_input(make_pixels()), image_input(PNG)])[0] == "400"
    assert refusal(client, "tiny", [pixel_input(make_pixels(33))])[0] == "413"


def test_decompression_bomb_is_refused(client: Any) -> None:
    large = pixel_input(np.zeros((10_000, SIDE, SIDE, 3), np.uint8))
    status, message = refusal(client, "tiny", [large], request_compression_algorithm="gzip")
    assert status == "413"
    assert "Decompressed request body exceeds" in message


def test_disconnected_clients_are_cancelled(server: Address, client: Any) -> None:
    body, n_json = client.generate_request_body([image_input(PNG)])
    head = (
        f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {n_json}\r\n\r\n"
    ).encode()
    for sent in (head, head + body[:20], head + body) * 10:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.sendall(sent)
        connection.close()
    client.infer("tiny", [image_input(PNG)])
    wait_until(lambda: sum(server.series("dtem_in_flight_images")) == 0)
    assert "Traceback" not in server.log
