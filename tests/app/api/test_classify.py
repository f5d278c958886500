import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.api.inference import probabilities_of
from app.backends import Outputs, Pixels
from app.store.catalogue import Catalogue, ServedModel, ServedVariant
from app.store.preprocessing import open_image
from app.store.selection import Query
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo, refused_images
from tests.app.tiny_store import LABELS, expected_logits

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 10
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def probabilities(r: int) -> Any:
    logits = expected_logits(np.asarray(make_photo(8, 8))[None], r)[0].astype(float)
    return np.exp(logits) / np.exp(logits).sum()


def assert_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    document: dict[str, Any] = response.json()
    assert response.status_code == status, document
    assert response.headers["content-type"] == "application/problem+json"
    assert document["type"] == "about:blank"
    assert (document["status"], document["code"]) == (status, code)
    assert document["title"]
    assert document["detail"]
    return document


@pytest.mark.parametrize("r", [0, 8, 16])
def test_classify_returns_the_probabilities_of_the_rate(client: TestClient, r: int) -> None:
    response = client.post(f"/classify?r={r}", content=PNG)
    assert response.status_code == 200
    answer = response.json()
    found = {item["index"]: item["probability"] for item in answer["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(3)], probabilities(r), atol=1e-5)
    assert [item["label"] for item in answer["predictions"]] == [
        LABELS[item["index"]] for item in answer["predictions"]
    ]
    assert answer["predictions"] == sorted(answer["predictions"], key=lambda item: -item["probability"])
    assert (answer["r"], answer["policy"], answer["gmacs"]) == (r, "tome", 1.0 - r / 50)
    assert answer["model"] == {"name": "tiny", "version": "1"}
    assert answer["tokens"] == [65, 65 - r, 65 - 2 * r]
    assert (answer["batch_size"], answer["degraded"]) == (1, False)
    accuracy = answer["accuracy"]
    assert (accuracy["top1"], accuracy["n_images"], accuracy["ci95"]) == (0.97, 10000, [0.966, 0.973])


def test_classify_gives_each_of_independent_labels_its_own_probability(
    make_client: ClientFactory, independent_catalogue: Catalogue
) -> None:
    client = make_client(independent_catalogue)
    predictions = client.post("/classify?r=16", content=PNG).json()["predictions"]
    logits = expected_logits(np.asarray(make_photo(8, 8))[None], 16)[0].astype(float)
    expected = 1 / (1 + np.exp(-logits))
    assert [item["index"] for item in predictions] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([item["probability"] for item in predictions], sorted(expected, reverse=True), rtol=1e-5)
    assert client.get("/models/tiny").json()["activation"] == "sigmoid"


def test_probabilities_do_not_overflow(catalogue: Catalogue, independent_catalogue: Catalogue) -> None:
    logits = np.array([-1000.0, 0.0, 1000.0], np.float32)
    for served, expected in ((catalogue, [0, 0, 1]), (independent_catalogue, [0, 0.5, 1])):
        np.testing.assert_allclose(probabilities_of(logits, served.find(None, None).manifest), expected)


def test_classify_reports_the_same_timings_in_body_and_header(client: TestClient) -> None:
    response = client.post("/classify", content=PNG)
    timings = response.json()["timings_ms"]
    assert list(timings) == ["decode", "queue", "inference", "total"]
    assert timings["total"] >= timings["decode"] + timings["queue"] + timings["inference"] > 0
    header = dict(item.split(";dur=") for item in response.headers["server-timing"].split(", "))
    assert {name: float(value) for name, value in header.items()} == timings


@pytest.mark.parametrize(
    "content_type", [None, "image/png", "image/jpeg", "application/x-www-form-urlencoded", "text/html", "💥", ";;;"]
)
def test_classify_ignores_the_content_type_of_an_image(client: TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type.encode()}
    assert client.post("/classify", content=PNG, headers=headers).status_code == 200  # type: ignore[arg-type]


def test_classify_returns_a_result_or_problem_per_file(client: TestClient) -> None:
    files = [
        ("file", ("a.png", PNG)),
        ("file", ("b.txt", b"text")),
        ("file", ("ü.png", PNG[:50])),
        ("file", ("d", PNG)),
    ]
    response = client.post("/classify?r=16", files=files)
    assert response.status_code == 200
    first, text, cut, last = response.json()["results"]
    assert [item["filename"] for item in (first, text, cut, last)] == ["a.png", "b.txt", "ü.png", "d"]
    for one, other in zip(first["predictions"], last["predictions"], strict=True):
        assert one == {**other, "probability": pytest.approx(other["probability"], rel=1e-5)}
    assert first["batch_size"] == last["batch_size"] == 2
    assert (text["status"], text["code"]) == (415, "not_an_image")
    assert (cut["status"], cut["code"]) == (400, "malformed_image")


def test_classify_returns_a_list_for_a_form_with_one_file(client: TestClient) -> None:
    (result,) = client.post("/classify", files={"file": PNG}).json()["results"]
    assert result["r"] == 8
    (result,) = client.post("/classify", files={"file": b"x"}).json()["results"]
    assert result["code"] == "not_an_image"


def test_classify_returns_results_in_the_order_of_the_form(client: TestClient) -> None:
    photos = [make_photo(8, 8, seed) for seed in range(20)]
    results = client.post("/classify", files=[("file", encode(photo, "PNG")) for photo in photos]).json()["results"]
    best = [int(expected_logits(np.asarray(photo)[None], 8).argmax()) for photo in photos]
    assert [item["predictions"][0]["index"] for item in results] == best
    assert all(1 <= item["batch_size"] <= 16 for item in results)


def form(*parts: bytes, boundary: bytes = b"XX") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def part(name: str = "file", content: bytes = PNG, rest: str = '; filename="x"') -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{rest}\r\n\r\n'.encode() + content


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("multipart/form-data", form(part()), 400, "malformed_body"),
        ("multipart/form-data; boundary=", form(part()), 400, "malformed_body"),
        ("multipart/form-data; boundary=" + "x" * 300, form(part()), 400, "malformed_body"),
        ("multipart/form-data; boundary=YY", form(part()), 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", b"", 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", PNG, 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", form(part())[:-10], 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", form(part())[:60], 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", form(b"X" * 50_000 + b": y\r\n\r\n"), 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", form(b"\0\xff: y\r\n\r\n"), 400, "malformed_body"),
        ("multipart/form-data; boundary=XX", form(), 422, "missing_file"),
        ("multipart/form-data; boundary=XX", form(part("image")), 422, "unknown_part"),
        (
            "multipart/form-data; boundary=XX",
            form(part("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"))),
            422,
            "unknown_part",
        ),
        ("multipart/form-data; boundary=XX", form(b"\r\n" + PNG), 422, "unknown_part"),
        ("multipart/form-data; boundary=XX", form(*[part()] * 33), 413, "too_many_files"),
        ("multipart/form-data; boundary=XX; charset=idna", form(part(content=b"")), 200, ""),
        ("multipart/form-data; boundary=XX; charset=unicode_escape", form(part(rest='; filename="\\ud800"')), 200, ""),
        ("Multipart/Form-Data; Boundary=XX", form(part(rest="")), 200, ""),
        ('multipart/form-data; boundary="XX"', form(part()), 200, ""),
    ],
)
def test_classify_accepts_or_refuses_forms(
    client: TestClient, content_type: str, body: bytes, status: int, code: str
) -> None:
    response = client.post("/classify", content=body, headers={"content-type": content_type})
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        assert_problem(response, status, code)


@pytest.mark.parametrize(("name", "case"), refused_images().items(), ids=lambda value: str(value)[:30])
def test_classify_refuses_bad_images_and_stays_available(
    make_client: ClientFactory, name: str, case: tuple[bytes, int]
) -> None:
    client = make_client(max_pixels=900_000)
    response = client.post("/classify", content=case[0])
    assert_problem(response, case[1], response.json()["code"])
    assert client.post("/classify", content=PNG).status_code == 200


def test_classify_refuses_an_empty_body(client: TestClient) -> None:
    assert_problem(client.post("/classify"), 400, "malformed_body")


def test_classify_lists_the_exported_rates(client: TestClient) -> None:
    problem = assert_problem(client.post("/classify?r=3", content=PNG), 422, "rate_not_exported")
    assert (problem["accepted"], problem["value"], problem["field"]) == ([0, 8, 16], 3, "r")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("r=abc", 422, "invalid_parameter"),
        ("r=", 422, "invalid_parameter"),
        ("r=8&r=8", 422, "duplicate_parameter"),
        ("rate=8", 422, "unknown_parameter"),
        ("R=8", 422, "unknown_parameter"),
        ("max_gmac=1", 422, "unknown_parameter"),
        ("max_gmacs=0.1", 422, "budget_not_met"),
        ("r=8&max_gmacs=1", 422, "conflicting_parameters"),
        ("deadline_ms=soon", 422, "invalid_parameter"),
        ("=8", 422, "unknown_parameter"),
        ("top_k=9", 422, "invalid_parameter"),
        ("policy=dtem", 422, "unknown_policy"),
        ("model=nope", 404, "unknown_model"),
        ("version=0", 404, "unknown_version"),
        ("%ff%fe=%00", 422, "unknown_parameter"),
        ("r=%ed%a0%80", 422, "invalid_parameter"),
        ("model=%00", 404, "unknown_model"),
        ("model=" + "x" * 20_000, 404, "unknown_model"),
        ("&".join(f"a{i}=1" for i in range(3000)), 422, "unknown_parameter"),
    ],
)
def test_classify_refuses_bad_queries(client: TestClient, query: str, status: int, code: str) -> None:
    problem = assert_problem(client.post(f"/classify?{query}", content=PNG), status, code)
    assert len(str(problem)) < 1000


def test_unknown_parameter_lists_the_accepted_parameters(client: TestClient) -> None:
    problem = client.post("/classify?rate=8", content=PNG).json()
    assert problem["field"] == "rate"
    assert problem["accepted"] == list(Query.model_fields)


class Gate:
    """A runner that blocks until it is opened, to fill the queue."""

    def __init__(self) -> None:
        self.started, self.opened, self.n_runs = threading.Event(), threading.Event(), 0
        self.error: BaseException | None = None

    def run(self, pixels: Pixels) -> Outputs:
        self.started.set()
        assert self.opened.wait(SECONDS)
        self.n_runs += 1
        if self.error:
            raise self.error
        return {"logits": np.zeros((len(pixels), 3), np.float32)}


def gate_all(catalogue: Catalogue, gate: Gate) -> Catalogue:
    model = catalogue.find(None, None)
    variants = {key: ServedVariant(variant.spec, gate) for key, variant in model.variants.items()}
    return Catalogue({"tiny": {1: ServedModel(model.manifest, variants)}}, "tiny")


def test_classify_refuses_immediately_when_full(make_client: ClientFactory, catalogue: Catalogue) -> None:
    gate = Gate()
    client = make_client(gate_all(catalogue, gate), max_in_flight_images=2, max_queue_images=2, max_files=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/classify", files=[("file", PNG)] * 2)
        assert gate.started.wait(SECONDS)
        refused = client.post("/classify", content=PNG)
        problem = assert_problem(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 images" in problem["detail"]
        gate.opened.set()
        assert first.result(SECONDS).status_code == 200
    assert client.post("/classify", content=PNG).status_code == 200


def test_classify_hides_the_cause_of_an_engine_failure(
    make_client: ClientFactory, catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    gate.opened.set()
    gate.error = RuntimeError("secret path /x/y")
    client = make_client(gate_all(catalogue, gate))
    response = client.post("/classify", content=PNG)
    assert_problem(response, 500, "inference_failed")
    assert "secret" not in response.text
    assert "secret" in caplog.text
    gate.error = None
    assert client.post("/classify", content=PNG).status_code == 200


def test_unexpected_errors_return_a_fixed_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("app.api.classify.select", fail)
    response = client.post("/classify", content=PNG)
    assert_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" in caplog.text


def test_classify_is_refused_until_the_models_are_loaded(make_client: ClientFactory, catalogue: Catalogue) -> None:
    client = make_client(None)
    for response in (client.post("/classify", content=PNG), client.get("/health/ready")):
        assert_problem(response, 503, "not_ready")
        assert response.headers["retry-after"] == "1"
    assert client.get("/health/live").status_code == 200
    client.service.publish(catalogue)  # type: ignore[attr-defined]
    assert client.get("/health/ready").json() == {"status": "ready"}
    assert client.post("/classify", content=PNG).status_code == 200


def test_draining_is_not_ready_but_serves_new_requests(make_client: ClientFactory, catalogue: Catalogue) -> None:
    gate = Gate()
    client = make_client(gate_all(catalogue, gate))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/classify", content=PNG)
        assert gate.started.wait(SECONDS)
        client.service.drain()  # type: ignore[attr-defined]
        second = pool.submit(client.post, "/classify", content=PNG)
        refusal = client.get("/health/ready")
        assert_problem(refusal, 503, "shutting_down")
        assert client.get("/health/live").status_code == 200
        gate.opened.set()
        for response in (first.result(SECONDS), second.result(SECONDS)):
            assert response.status_code == 200
            assert response.headers.get_list("connection") == ["close"]


def test_connection_close_is_sent_once_while_draining(make_client: ClientFactory) -> None:
    client = make_client(max_body_bytes=10)
    client.service.drain()  # type: ignore[attr-defined]
    response = client.post("/classify", content=PNG)
    assert_problem(response, 413, "body_too_large")
    assert response.headers.get_list("connection") == ["close"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/classify", 405, "method_not_allowed"),
        ("POST", "/classify/", 404, "unknown_path"),
        ("GET", "/", 404, "unknown_path"),
        ("GET", "/%ff%00", 404, "unknown_path"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("GET", "/models/nope", 404, "unknown_model"),
        ("GET", "/models/tiny?version=2", 404, "unknown_version"),
        ("GET", "/models?x=1", 422, "unknown_parameter"),
        ("GET", "/models/tiny?version=1&version=1", 422, "duplicate_parameter"),
    ],
)
def test_other_errors_are_problem_documents(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    response = client.request(method, path)
    assert_problem(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


def test_body_limit_is_exact(make_client: ClientFactory) -> None:
    client = make_client(max_body_bytes=len(PNG))
    assert client.post("/classify", content=PNG).status_code == 200
    response = client.post("/classify", content=PNG + b"x")
    assert_problem(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_body_limit_counts_a_body_without_content_length(make_client: ClientFactory) -> None:
    client = make_client(max_body_bytes=1000)
    taken = []

    def chunks() -> Any:
        for i in range(100):
            taken.append(i)
            yield bytes(100)

    assert_problem(client.post("/classify", content=chunks()), 413, "body_too_large")


def test_top_k_limits_the_predictions(client: TestClient) -> None:
    assert len(client.post("/classify?top_k=1", content=PNG).json()["predictions"]) == 1
    assert len(client.post("/classify", content=PNG).json()["predictions"]) == 3


def test_images_of_a_form_share_a_budget_of_pixels(make_client: ClientFactory) -> None:
    image = encode(make_photo(20, 10), "PNG")
    client = make_client(max_pixels=400, max_request_pixels=500)
    files = [("file", ("x", image)) for _ in range(3)]
    results = client.post("/classify", files=files).json()["results"]
    assert sorted(result.get("status", 200) for result in results) == [200, 200, 413]
    (refused,) = (result for result in results if result.get("status") == 413)
    assert (refused["code"], refused["max_request_pixels"]) == ("too_many_pixels", 500)


def test_wait_for_a_decoder_is_part_of_the_queue_stage(
    make_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(n_decode_threads=1)

    def open_slowly(*arguments: Any) -> Any:
        time.sleep(0.05)
        return open_image(*arguments)

    monkeypatch.setattr("app.serving.service.open_image", open_slowly)
    files = [("file", ("x", encode(make_photo(20, 10), "PNG"))) for _ in range(3)]
    timings = [result["timings_ms"] for result in client.post("/classify", files=files).json()["results"]]
    # Each waits for the ones before it; none of them for the device.
    assert max(timing["queue"] for timing in timings) >= 100
    assert max(timing["decode"] for timing in timings) >= 50
