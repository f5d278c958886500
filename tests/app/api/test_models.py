import pytest
from starlette.testclient import TestClient

from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(8, 8), "PNG")


def test_models_lists_every_variant(client: TestClient) -> None:
    answer = client.get("/models").json()
    assert answer["default"] == {"name": "tiny", "version": "1"}
    (model,) = answer["models"]
    assert [(item["policy"], item["r"]) for item in model["variants"]] == [
        ("atm", None),
        ("none", 0),
        ("tome", 0),
        ("tome", 8),
        ("tome", 16),
    ]
    variant = model["variants"][-1]
    assert (variant["format"], variant["precision"], variant["gmacs"]) == ("onnx", "float32", 1.0 - 16 / 50)
    assert (variant["tokens"], variant["schedule"]) == ([65, 49, 33], [16, 16])
    assert variant["accuracy"]["date"] == "2026-11-20"
    assert model["default"] == {"policy": "tome", "r": 8}
    assert (model["labels"], model["licence"], model["credits"]) == (["red", "green", "blue"], "MIT", ["nobody"])
    assert model["input"]["resize_shorter_side"] == 8


def test_models_shows_the_measured_latency(client: TestClient) -> None:
    def n_seen() -> int:
        n: int = client.get("/models/tiny").json()["variants"][-1]["latency_ms"]["n"]
        return n

    before = n_seen()
    assert before >= 1
    client.post("/classify?r=16", content=PNG)
    assert n_seen() == min(before + 1, 100)
    client.post("/classify?r=16", files=[("file", PNG)] * 2)
    assert n_seen() == min(before + 1, 100)


def test_models_shows_the_expected_batch_durations(make_client: ClientFactory) -> None:
    variant = make_client(max_batch_images=4).get("/models/tiny").json()["variants"][-1]
    assert [item["batch_size"] for item in variant["run_ms"]] == [1, 2, 4]
    assert all(item["expected"] > 0 for item in variant["run_ms"])


def test_model_by_name_accepts_a_version(client: TestClient) -> None:
    assert client.get("/models/tiny?version=1").json() == client.get("/models/tiny").json()


def sample(client: TestClient, line: str) -> float:
    found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def test_metrics_count_requests_images_and_refusals(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?r=16", content=PNG)
    client.post("/classify?r=16", files=[("file", PNG), ("file", b"x"), ("file", PNG)])
    client.post("/classify?r=16", content=b"x")
    client.post("/classify?r=3", content=PNG)
    r16 = 'model="tiny",policy="tome",r="16"'
    assert sample(client, f'dtem_requests_total{{code="200",{r16}}}') == 2
    assert sample(client, f'dtem_requests_total{{code="415",{r16}}}') == 1
    assert sample(client, 'dtem_requests_total{code="422",model="",policy="",r=""}') == 1
    assert sample(client, f"dtem_images_total{{{r16}}}") == 3
    assert sample(client, 'dtem_refusals_total{reason="not_an_image"}') == 2
    assert sample(client, 'dtem_refusals_total{reason="rate_not_exported"}') == 1
    assert sample(client, f"dtem_gmacs_saved_total{{{r16}}}") == pytest.approx(3 * 16 / 50)
    assert sample(client, f"dtem_batch_images_sum{{{r16}}}") == 3
    assert sample(client, f"dtem_busy_seconds_total{{{r16}}}") > 0
    for stage, n in {"decode": 3, "queue": 3, "inference": 3, "total": 3}.items():
        assert sample(client, f'dtem_stage_seconds_count{{{r16},stage="{stage}"}}') == n, stage


def test_metrics_show_state(make_client: ClientFactory) -> None:
    client = make_client()
    text = client.get("/metrics").text
    assert sample(client, "dtem_ready") == 1
    assert sample(client, "dtem_in_flight_images") == 0
    # The queue is empty.
    assert "dtem_queue_depth_images{" not in text
    assert sample(client, 'dtem_model_info{device="cpu",format="onnx",model="tiny",version="1"}') == 1
    assert "process_resident_memory_bytes" in text
    # No series exists before the first request.
    assert 'le="0.0005"' not in text
    client.service.drain()  # type: ignore[attr-defined]
    assert sample(client, "dtem_ready") == 0


def test_metrics_of_two_services_are_separate(make_client: ClientFactory) -> None:
    first, second = make_client(), make_client()
    first.post("/classify", content=PNG)
    line = 'dtem_requests_total{code="200",model="tiny",policy="tome",r="8"}'
    assert (sample(first, line), sample(second, line)) == (1, 0)
