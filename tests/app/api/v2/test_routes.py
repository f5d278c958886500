import base64
import gzip
import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.store.catalogue import Catalogue
from tests.app.api.test_boundary import log_fields
from tests.app.api.test_classify import SECONDS, Gate, gate_all
from tests.app.api.test_models import sample
from tests.app.api.v2.requests import (
    LENGTH_HEADER,
    PATH,
    PNG,
    binary_input,
    frame,
    image_input,
    make_pixels,
    pixel_input,
    with_length,
)
from tests.app.conftest import ClientFactory
from tests.app.odd_images import make_photo
from tests.app.tiny_store import LABELS, expected_costs, expected_logits


def infer(client: TestClient, tensor: dict[str, Any], path: str = PATH, **envelope: Any) -> Any:
    return client.post(path, json={"inputs": [tensor], **envelope})


def outputs_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {item["name"]: np.reshape(item["data"], item["shape"]) for item in response.json()["outputs"]}


def assert_error(response: Any, status: int, *words: str) -> None:
    document = response.json()
    assert response.status_code == status, document
    assert response.headers["content-type"] == "application/json"
    assert list(document) == ["error"]
    for word in words:
        assert word in document["error"]


@pytest.mark.parametrize("path", [PATH, "/v2/models/tiny/versions/1/infer"])
def test_infer_returns_every_output(client: TestClient, path: str) -> None:
    pixels = make_pixels(3)
    response = infer(client, pixel_input(pixels), path, id="request-1", parameters={"r": 16})
    outputs = outputs_of(response)
    logits = expected_logits(pixels, 16)
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5)
    powers = np.exp(logits.astype(float))
    np.testing.assert_allclose(outputs["probabilities"], powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
    assert outputs["label"].tolist() == [LABELS[place] for place in logits.argmax(axis=1)]
    assert outputs["tokens"].tolist() == [[65, 49, 33]] * 3
    np.testing.assert_allclose(outputs["gmacs"], [0.68] * 3)
    answer = response.json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("request-1", "tiny", "1")
    assert [item["datatype"] for item in answer["outputs"]] == ["FP32", "FP32", "BYTES", "INT64", "FP32"]


def test_infer_gives_each_of_independent_labels_its_own_probability(
    make_client: ClientFactory, independent_catalogue: Catalogue
) -> None:
    pixels = make_pixels(3)
    outputs = outputs_of(infer(make_client(independent_catalogue), pixel_input(pixels), parameters={"r": 16}))
    logits = expected_logits(pixels, 16)
    np.testing.assert_allclose(outputs["probabilities"], 1 / (1 + np.exp(-logits)), rtol=1e-5)
    assert outputs["label"].tolist() == [LABELS[place] for place in logits.argmax(axis=1)]


def test_infer_describes_what_ran(client: TestClient) -> None:
    response = infer(client, pixel_input(make_pixels(2)), parameters={"r": "16", "policy": "tome"})
    parameters = response.json()["parameters"]
    timings = {name: parameters.pop(f"{name}_ms") for name in ("decode", "queue", "inference", "total")}
    # Depends on the measured costs.
    assert parameters.pop("batch_size") in (1, 2)
    assert parameters == {
        "policy": "tome",
        "r": 16,
        "gmacs": 1.0 - 16 / 50,
        "accuracy_top1": 0.97,
        "accuracy_dataset": "tiny",
        "degraded": False,
    }
    header = dict(item.split(";dur=") for item in response.headers["server-timing"].split(", "))
    assert {name: float(value) for name, value in header.items()} == timings
    assert "id" not in response.json()


def test_adaptive_policy_returns_the_cost_of_each_image(client: TestClient) -> None:
    pixels = make_pixels(2)
    pixels[1] //= 4
    response = infer(client, pixel_input(pixels), parameters={"policy": "atm"})
    tokens, gmacs = expected_costs(pixels)
    outputs = outputs_of(response)
    assert outputs["tokens"].tolist() == tokens.tolist()
    np.testing.assert_allclose(outputs["gmacs"], gmacs, rtol=1e-6)
    parameters = response.json()["parameters"]
    # Omitted, because an adaptive policy has no r and the protocol has no null.
    assert "r" not in parameters
    assert "accuracy_top1" not in parameters
    assert parameters["gmacs"] == pytest.approx(float(gmacs.mean()))


def test_image_files_and_their_pixels_have_the_same_result(client: TestClient) -> None:
    files = image_input([1, 1], data=[base64.b64encode(PNG).decode()])
    pixels = pixel_input(np.asarray(make_photo(8, 8))[None])
    raw = client.post(PATH, content=PNG, headers={LENGTH_HEADER: "0"})
    answers = [outputs_of(infer(client, tensor)) for tensor in (files, pixels)] + [outputs_of(raw)]
    for answer in answers:
        np.testing.assert_allclose(answer["logits"], answers[0]["logits"], rtol=1e-5)


def test_binary_outputs_follow_the_json_in_order(client: TestClient) -> None:
    pixels = make_pixels(2)
    outputs = [{"name": "label"}, {"name": "gmacs", "parameters": {"binary_data": False}}, {"name": "logits"}]
    body, headers = frame(
        binary_input(pixels.tobytes(), shape=[2, 8, 8, 3]),
        pixels.tobytes(),
        outputs=outputs,
        parameters={"binary_data_output": True, "r": 0},
    )
    response = client.post(PATH, content=body, headers=headers)
    assert response.headers["content-type"] == "application/octet-stream"
    n_json = int(response.headers[LENGTH_HEADER])
    label, gmacs, logits = json.loads(response.content[:n_json])["outputs"]
    assert gmacs["data"] == [1.0, 1.0]
    expected = expected_logits(pixels, 0)
    texts = with_length(*[LABELS[place].encode() for place in expected.argmax(axis=1)])
    assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(texts)}}
    assert logits["parameters"]["binary_data_size"] == expected.nbytes
    stream = io.BytesIO(response.content[n_json:])
    assert stream.read(len(texts)) == texts
    np.testing.assert_allclose(np.frombuffer(stream.read(), "<f4").reshape(2, 3), expected, rtol=1e-5)


def test_classification_is_formatted_as_in_triton(client: TestClient) -> None:
    pixels = make_pixels(2)
    outputs = [
        {"name": "probabilities", "parameters": {"classification": 2}},
        {"name": "logits", "parameters": {"classification": 3}},
    ]
    probabilities, logits = infer(client, pixel_input(pixels), outputs=outputs).json()["outputs"]
    assert (probabilities["datatype"], probabilities["shape"], logits["shape"]) == ("BYTES", [2, 2], [2, 3])
    expected = expected_logits(pixels, 8)
    for row, texts in zip(expected, np.reshape(logits["data"], (2, 3)), strict=True):
        found = [text.split(":") for text in texts]
        assert [int(place) for _, place, _ in found] == np.argsort(-row).tolist()
        assert [label for _, _, label in found] == [LABELS[place] for place in np.argsort(-row)]
        np.testing.assert_allclose([float(value) for value, _, _ in found], np.sort(row)[::-1], atol=1e-5)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_are_compressed_in_both_directions(client: TestClient, encoding: str, pack: Any) -> None:
    pixels = make_pixels(2)
    body, headers = frame(binary_input(pixels.tobytes(), shape=[2, 8, 8, 3]), pixels.tobytes())
    response = client.post(
        PATH, content=pack(body), headers={**headers, "Content-Encoding": encoding, "Accept-Encoding": encoding}
    )
    assert response.headers["content-encoding"] == encoding
    np.testing.assert_allclose(outputs_of(response)["logits"], expected_logits(pixels, 8), rtol=1e-5)
    plain = client.post(PATH, content=body, headers={**headers, "Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


def test_large_json_body_is_read_in_a_thread(make_client: ClientFactory) -> None:
    client = make_client(max_files=32)
    pixels = make_pixels(32)
    body = json.dumps({"inputs": [pixel_input(pixels)]})
    # Larger bodies are read in a thread.
    assert len(body) > 20_000
    np.testing.assert_allclose(
        outputs_of(client.post(PATH, content=body))["logits"], expected_logits(pixels, 8), rtol=1e-5
    )


def test_bad_image_is_named_and_counted_once(make_client: ClientFactory) -> None:
    client = make_client()
    binary = with_length(PNG, b"text", PNG[:50])
    body, headers = frame(image_input([3], parameters={"binary_data_size": len(binary)}), binary)
    assert_error(client.post(PATH, content=body, headers=headers), 415, "Image 1: ", "JPEG, PNG")
    assert sample(client, 'dtem_refusals_total{reason="not_an_image"}') == 1
    assert sample(client, 'dtem_requests_total{code="415",model="tiny",policy="tome",r="8"}') == 1


def test_pixel_limit_applies_to_image_files(make_client: ClientFactory) -> None:
    client = make_client(max_pixels=10)
    assert_error(client.post(PATH, content=PNG, headers={LENGTH_HEADER: "0"}), 413, "Image 0: ", "the limit is 10")


def test_infer_is_counted_and_logged(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    with caplog.at_level("INFO"):
        infer(client, pixel_input(make_pixels(3)), parameters={"r": 16})
    (line,) = log_fields(caplog)
    assert (line["path"], line["status"], line["model"], line["version"]) == (PATH, 200, "tiny", "1")
    infer(client, pixel_input(make_pixels()), parameters={"r": 3})
    client.get("/v2/models/tiny")
    r16 = 'model="tiny",policy="tome",r="16"'
    assert sample(client, f'dtem_requests_total{{code="200",{r16}}}') == 1
    assert sample(client, f"dtem_images_total{{{r16}}}") == 3
    assert sample(client, 'dtem_requests_total{code="422",model="",policy="",r=""}') == 1
    assert sample(client, 'dtem_refusals_total{reason="rate_not_exported"}') == 1


def test_too_many_images_and_bytes_are_refused(make_client: ClientFactory) -> None:
    client = make_client(max_files=2, max_body_bytes=5000)
    assert_error(infer(client, pixel_input(make_pixels(3))), 413, "3 images exceed the limit of 2")
    assert_error(client.post(PATH, content=bytes(6000)), 413, "Request body exceeds 5000 bytes.")
    bomb = gzip.compress(bytes(1_000_000))
    response = client.post(PATH, content=bomb, headers={"Content-Encoding": "gzip"})
    assert_error(response, 413, "Decompressed request body exceeds 5000 bytes.")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/nope", 404, ["'nope'", "tiny"]),
        ("GET", "/v2/models/tiny/versions/2", 404, ["'2'", "1"]),
        ("GET", "/v2/models/tiny/versions/x/ready", 404, ["'x'"]),
        ("GET", "/v2/models/nope/ready", 404, ["'nope'"]),
        ("GET", "/v2/models/nope/config", 404, ["'nope'"]),
        ("GET", "/v2/models/nope/stats", 404, ["'nope'"]),
        ("POST", "/v2/models/nope/infer", 404, ["'nope'"]),
        ("GET", "/v2/nothing", 404, ["/v2/nothing"]),
        ("POST", "/v2/repository/models/tiny/unload", 404, ["unload"]),
        ("GET", PATH, 405, ["GET"]),
        ("POST", "/v2", 405, ["POST"]),
        ("GET", "/v2?verbose=1", 422, ["'verbose'"]),
        ("POST", PATH + "?r=8", 422, ["'r'"]),
        ("POST", PATH, 400, ["Invalid JSON: "]),
    ],
)
def test_errors_have_the_format_of_the_protocol(
    client: TestClient, method: str, path: str, status: int, words: list[str]
) -> None:
    response = client.request(method, path)
    assert_error(response, status, *words)
    assert ("allow" in response.headers) == (status == 405)


def test_unknown_encoding_is_refused_with_the_accepted_ones(client: TestClient) -> None:
    response = client.post(PATH, content=PNG, headers={"Content-Encoding": "br"})
    assert_error(response, 415, "'br'", "gzip, deflate, identity")
    assert response.headers["accept-encoding"] == "gzip, deflate, identity"


def test_missing_key_has_the_error_format_of_the_protocol(make_client: ClientFactory) -> None:
    client = make_client(api_keys="sesame")
    for response in (client.get("/v2"), client.get("/v2/models/tiny"), infer(client, pixel_input(make_pixels()))):
        assert_error(response, 401, "Authorization: Bearer")
        assert "www-authenticate" in response.headers
    assert client.get("/v2/health/ready").status_code == 200
    client.headers["Authorization"] = "Bearer sesame"
    assert infer(client, pixel_input(make_pixels())).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/live", "/v2/models", "/v2/models/tiny", "/v2/models/tiny/ready", "/health/live"]
)
def test_head_returns_the_headers_of_get(client: TestClient, path: str) -> None:
    name = {"x-request-id": "same"}
    head, get = client.head(path, headers=name), client.get(path, headers=name)
    assert (head.status_code, head.headers) == (get.status_code, get.headers)
    assert client.head("/classify").status_code == 405


def test_engine_errors_have_the_format_of_the_protocol(
    make_client: ClientFactory, catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    client = make_client(gate_all(catalogue, gate), max_in_flight_images=2, max_queue_images=2, max_files=2)
    gate.error = RuntimeError("secret")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(infer, client, pixel_input(make_pixels(2)))
        assert gate.started.wait(SECONDS)
        refused = infer(client, pixel_input(make_pixels()))
        assert_error(refused, 429, "2 images are in flight")
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert_error(first.result(SECONDS), 500, "Inference failed.")
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("parameters", "r"),
    [
        # The rates of the tiny model are equally accurate, so the cheapest is selected.
        ({"max_gmacs": 0.9}, 16),
        ({"max_gmacs": "0.7"}, 16),
        ({"min_accuracy": 0.9}, 16),
        ({"deadline_ms": 30_000}, 16),
        ({"timeout": 30_000_000}, 16),
        ({"r": 8, "allow_degrade": True}, 8),
        ({"r": 8, "max_r": 16}, 8),
    ],
)
def test_infer_selects_the_same_variant_as_classify(client: TestClient, parameters: dict[str, Any], r: int) -> None:
    pixels = make_pixels(2)
    response = infer(client, pixel_input(pixels), parameters=parameters)
    query = {name: value for name, value in parameters.items() if name != "timeout"} or {"deadline_ms": 30_000}
    assert client.post("/classify", params=query, content=PNG).json()["r"] == r
    np.testing.assert_allclose(outputs_of(response)["logits"], expected_logits(pixels, r), rtol=1e-5)
    assert (response.json()["parameters"]["r"], response.json()["parameters"]["degraded"]) == (r, False)


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"max_gmacs": 0.1}, 422, ["at most 0.1 GMACs", "Minimum: 0.6"]),
        ({"r": 8, "max_gmacs": 1}, 422, ["r and max_gmacs are mutually exclusive"]),
        ({"r": 8, "timeout": 5}, 422, ["r and deadline_ms are mutually exclusive"]),
        ({"min_accuracy": 7}, 422, ["min_accuracy=7 is not"]),
        ({"deadline_ms": "soon"}, 422, ["deadline_ms=soon is not"]),
        ({"allow_degrade": "perhaps"}, 422, ["neither true nor false"]),
    ],
)
def test_invalid_selectors_are_refused(
    client: TestClient, parameters: dict[str, Any], status: int, words: list[str]
) -> None:
    assert_error(infer(client, pixel_input(make_pixels()), parameters=parameters), status, *words)


def test_passed_deadline_is_refused_in_time(make_client: ClientFactory, catalogue: Catalogue) -> None:
    gate = Gate()
    client = make_client(gate_all(catalogue, gate))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(infer, client, pixel_input(make_pixels()))
        assert gate.started.wait(SECONDS)
        late = infer(client, pixel_input(make_pixels()), parameters={"timeout": 200_000})
        # Refused at once or when it has passed, depending on the measured costs.
        assert late.status_code in (429, 504)
        assert list(late.json()) == ["error"]
        gate.opened.set()
        assert first.result(SECONDS).status_code == 200


def test_nothing_is_served_before_the_models_are_loaded(make_client: ClientFactory, catalogue: Catalogue) -> None:
    client = make_client(None)
    for path in ("/v2/health/ready", "/v2/models", "/v2/models/tiny", "/v2/models/tiny/ready"):
        response = client.get(path)
        assert_error(response, 503, "being loaded")
        assert response.headers["retry-after"] == "1"
    assert_error(infer(client, pixel_input(make_pixels())), 503, "being loaded")
    assert client.get("/v2/health/live").json() == {"live": True}
    client.service.publish(catalogue)  # type: ignore[attr-defined]
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/tiny/versions/1/ready").json() == {"name": "tiny", "ready": True}


def test_metadata_and_configuration_agree(client: TestClient) -> None:
    metadata = client.get("/v2/models/tiny").json()
    config = client.get("/v2/models/tiny/config").json()
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    assert config["max_batch_size"] == client.service.settings.max_files  # type: ignore[attr-defined]
    assert [item["name"] for item in metadata["inputs"]] == ["pixels", "image"]
    for described, configured in zip(
        metadata["inputs"] + metadata["outputs"], config["input"] + config["output"], strict=True
    ):
        assert described["name"] == configured["name"]
        assert described["shape"][0] == -1
        is_scalar = configured.get("reshape") == {"shape": []}
        assert described["shape"][1:] == ([] if is_scalar else configured["dims"])


def test_metadata_matches_the_outputs(client: TestClient) -> None:
    described = client.get("/v2/models/tiny").json()["outputs"]
    answered = infer(client, pixel_input(make_pixels(2))).json()["outputs"]
    for metadata, output in zip(described, answered, strict=True):
        assert (metadata["name"], metadata["datatype"]) == (output["name"], output["datatype"])
        assert [2, *metadata["shape"][1:]] == output["shape"]


def test_server_lists_its_models(client: TestClient) -> None:
    assert client.get("/v2/models").json() == {"models": ["tiny"]}
    index = client.post("/v2/repository/index", content=b"").json()
    assert index == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]
    server = client.get("/v2").json()
    assert server["name"] == "dtem-serve"
    assert "binary_tensor_data" in server["extensions"]


def test_statistics_count_requests_and_images(make_client: ClientFactory) -> None:
    client = make_client()
    infer(client, pixel_input(make_pixels(3)))
    infer(client, pixel_input(make_pixels()))
    infer(client, pixel_input(make_pixels()), parameters={"r": 3})
    (stats,) = client.get("/v2/models/stats").json()["model_stats"]
    assert (stats["name"], stats["version"]) == ("tiny", "1")
    assert stats["inference_count"] == 4
    # The three images of a request may share a batch.
    assert 2 <= stats["execution_count"] <= 4
    counts = {name: duration["count"] for name, duration in stats["inference_stats"].items()}
    assert counts == dict.fromkeys(["success", "queue", "compute_input", "compute_infer", "compute_output"], 2) | {
        "fail": 1
    }
    assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
    assert stats["last_inference"] > 0
    for path in ("/v2/models/tiny/stats", "/v2/models/tiny/versions/1/stats"):
        assert client.get(path).json()["model_stats"] == [stats]
