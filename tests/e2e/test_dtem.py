"""A tiny model, exported with an embedding and served with policies dtem, tome and none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.embedding.__main__ import main as measure_embedding
from tests.integration.server import ROOT, Server
from tests.training.commands import dtem
from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig

IMAGE = next((ROOT / "examples").glob("*.png"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtem")
    store = folder / "store"
    store.mkdir()
    save_file(tiny_vit().state_dict(), folder / "weights.safetensors")
    torch.manual_seed(5)
    embedding = DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=16))
    embedding.save(folder / "embedding.safetensors")
    model = ["--architecture", "vit_tiny_patch16_224", "--arguments", json.dumps(ARGUMENTS)]
    files = ["--weights", str(folder / "weights.safetensors"), "--embedding", str(folder / "embedding.safetensors")]
    plan = ["--name", "tiny", "--store", str(store), "--rates", "0,8", "--data", "digits", "--n-images", "200"]
    assert dtem("export", [*model, *files, *plan]) == 0
    return store


@pytest.fixture(scope="module")
def client(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        Server(store, tmp_path_factory.mktemp("log") / "server.log") as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client,
    ):
        yield client


def classify(client: httpx.Client, query: str) -> dict[str, Any]:
    response = client.post(f"/classify?{query}", content=IMAGE.read_bytes())
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare the classes exactly and the probabilities up to rounding."""
    assert [one["index"] for one in found] == [one["index"] for one in expected]
    probabilities = [one["probability"] for one in expected]
    assert [one["probability"] for one in found] == pytest.approx(probabilities, abs=1e-6)


def test_models_lists_dtem_as_the_default_policy(client: httpx.Client) -> None:
    (model,) = client.get("/models").json()["models"]
    assert model["default"] == {"policy": "dtem", "r": 8}
    found = {(variant["policy"], variant["r"]) for variant in model["variants"]}
    assert found == {("none", 0), ("tome", 0), ("tome", 8), ("dtem", 0), ("dtem", 8)}


def test_dtem_and_tome_merge_different_tokens(client: httpx.Client) -> None:
    answers = {policy: classify(client, f"policy={policy}&r=8&top_k=10") for policy in ("dtem", "tome")}
    assert {policy: (answer["policy"], answer["r"]) for policy, answer in answers.items()} == {
        "dtem": ("dtem", 8),
        "tome": ("tome", 8),
    }
    assert answers["dtem"]["predictions"] != answers["tome"]["predictions"]
    assert_close(classify(client, "top_k=10")["predictions"], answers["dtem"]["predictions"])


def test_policies_agree_at_rate_0(client: httpx.Client) -> None:
    answers = [classify(client, f"policy={policy}&r=0")["predictions"] for policy in ("none", "tome", "dtem")]
    assert_close(answers[1], answers[0])
    assert_close(answers[2], answers[0])


def test_benchmark_measures_the_cost_of_the_embedding(store: Path, tmp_path: Path) -> None:
    options = ["--rates", "8", "--batches", "1", "--rounds", "6", "--out", str(tmp_path / "cost")]
    assert measure_embedding(["--published", str(store / "tiny" / "1"), *options]) == 0
    content = json.loads((tmp_path / "cost.json").read_text())
    (compute,) = content["compute"]
    assert compute["embedding"] == pytest.approx((197 + 189 + 181) * 32 * 8 / 1e9)
    assert content["latency"][0]["ratio"]["median"] > 0
    assert "| 8 | 1 |" in (tmp_path / "cost.md").read_text()
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_benchmark_refuses_a_version_without_an_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert measure_embedding(["--published", str(tmp_path), "--out", str(tmp_path / "cost")]) == 2
    assert "has no embedding" in capsys.readouterr().err
