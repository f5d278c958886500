"""Adaptive policies: each response has the token counts and the GMACs of its image."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.backends import Outputs, Pixels
from app.store.catalogue import Catalogue, ServedModel, ServedVariant
from tests.app.api.test_models import sample
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode
from tests.app.tiny_store import ATM_BIAS, PROMISE, expected_costs, expected_logits

DARK, BRIGHT = (encode(Image.new("RGB", (8, 8), (level, level, level)), "PNG") for level in (10, 240))
ATM = 'model="tiny",policy="atm",r=""'


def pixels(level: int) -> Any:
    return np.full((1, 8, 8, 3), level, np.uint8)


@pytest.mark.parametrize(("image", "level"), [(DARK, 10), (BRIGHT, 240)])
def test_response_has_the_costs_of_its_image(client: TestClient, image: bytes, level: int) -> None:
    answer = client.post("/classify?policy=atm", content=image).json()
    tokens, gmacs = expected_costs(pixels(level))
    assert (answer["policy"], answer["r"], answer["tokens"]) == ("atm", None, tokens[0].tolist())
    assert answer["gmacs"] == pytest.approx(gmacs[0])
    logits = expected_logits(pixels(level), ATM_BIAS)[0]
    found = {item["index"]: item["probability"] for item in answer["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(3)], np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_results_are_batch_invariant(client: TestClient) -> None:
    files = [("file", DARK), ("file", b"text"), ("file", BRIGHT), ("file", DARK)]
    results = client.post("/classify?policy=atm", files=files).json()["results"]
    assert results[1]["code"] == "not_an_image"
    for result, image in ((results[0], DARK), (results[2], BRIGHT), (results[3], DARK)):
        alone = client.post("/classify?policy=atm", content=image).json()
        assert result["batch_size"] == 3
        assert result["tokens"] == alone["tokens"]
        assert result["gmacs"] == pytest.approx(alone["gmacs"], rel=1e-6)
        assert [item["index"] for item in result["predictions"]] == [item["index"] for item in alone["predictions"]]
        assert [item["probability"] for item in result["predictions"]] == pytest.approx(
            [item["probability"] for item in alone["predictions"]], abs=1e-6
        )
    assert results[0]["gmacs"] > results[2]["gmacs"]


def test_costs_over_several_batches_keep_the_order_of_the_images(make_client: ClientFactory) -> None:
    client = make_client(max_batch_images=2)
    files = [("file", image) for image in (DARK, BRIGHT, BRIGHT, DARK, BRIGHT)]
    results = client.post("/classify?policy=atm", files=files).json()["results"]
    dark, bright = (expected_costs(pixels(level))[0][0].tolist() for level in (10, 240))
    assert [result["tokens"] for result in results] == [dark, bright, bright, dark, bright]


def test_rate_is_refused(client: TestClient) -> None:
    problem = client.post("/classify?policy=atm&r=8", content=DARK)
    assert (problem.status_code, problem.json()["code"], problem.json()["field"]) == (422, "invalid_parameter", "r")
    assert problem.json()["detail"] == "r=8 is not accepted: policy 'atm' is adaptive and has no rates."


def test_models_lists_spread_and_promise(client: TestClient) -> None:
    variants = {variant["id"]: variant for variant in client.get("/models/tiny").json()["variants"]}
    atm, fixed = variants["atm-float32-onnx"], variants["tome-r8-float32-onnx"]
    assert (atm["r"], atm["data_dependent"], atm["gmacs_spread"]) == (None, True, {"p5": 0.5, "p95": 0.9})
    assert atm["promise"] == PROMISE
    assert (fixed["data_dependent"], fixed["gmacs_spread"], fixed["promise"]) == (False, None, None)


def test_metrics_have_a_histogram_of_kept_tokens(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?policy=atm", files=[("file", DARK), ("file", b"text"), ("file", BRIGHT)])
    client.post("/classify?r=16", content=DARK)
    kept = [int(expected_costs(pixels(level))[0][0, -1]) for level in (10, 240)]
    assert sample(client, f"dtem_kept_tokens_count{{{ATM}}}") == 2
    assert sample(client, f"dtem_kept_tokens_sum{{{ATM}}}") == sum(kept)
    buckets = {
        le: sample(client, f'dtem_kept_tokens_bucket{{le="{le}",{ATM}}}') for le in ("8.0", "16.0", "64.0", "80.0")
    }
    assert [buckets[le] for le in buckets] == [sum(n <= float(le) for n in kept) for le in buckets]
    assert sample(client, 'dtem_kept_tokens_sum{model="tiny",policy="tome",r="16"}') == 33


def test_non_finite_or_missing_costs_fail_the_request(make_client: ClientFactory, catalogue: Catalogue) -> None:
    class Broken:
        gmacs = np.array([np.nan], np.float32)

        def run(self, pixels: Pixels) -> Outputs:
            n = len(pixels)
            logits, tokens = np.zeros((n, 3), np.float32), np.ones((n, 3), np.int64)
            return {"logits": logits, "tokens": tokens, "gmacs": self.gmacs}

    runner, model = Broken(), catalogue.find(None, None)
    spec = model.variant("atm", None).spec
    variants = {spec.key: ServedVariant(spec, runner)}
    client = make_client(Catalogue({"tiny": {1: ServedModel(model.manifest, variants)}}, "tiny"))
    assert client.post("/classify?policy=atm", content=DARK).json()["code"] == "inference_failed"
    runner.gmacs = np.ones(2, np.float32)
    assert client.post("/classify?policy=atm", content=DARK).json()["code"] == "inference_failed"
    runner.gmacs = np.ones(1, np.float32)
    assert client.post("/classify?policy=atm", content=DARK).status_code == 200
