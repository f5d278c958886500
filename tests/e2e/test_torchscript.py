"""The reference model exported as TorchScript: it answers as its published ONNX graphs do."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.store import newest_version
from tests.integration.server import ROOT, Server
from tests.training.commands import dtem

EXAMPLES = sorted((ROOT / "examples").glob("*.png"))


QUERIES = ("r=0", "r=8", "policy=atm", "policy=adaptive-dtem")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_formats_answer_alike(tmp_path: Path) -> None:
    published, store = ROOT / "model_store", tmp_path / "store"
    store.mkdir()
    model = ["--published", str(newest_version("reference")), "--name", "reference", "--store", str(store)]
    assert dtem("export", [*model, "--formats", "torchscript", "--rates", "0,8", "--n-images", "256"]) == 0
    answers = {}
    for served, folder in (("onnxruntime", published), ("torchscript", store)):
        with Server(folder, tmp_path / f"{served}.log", engine=served) as server:
            address = f"http://127.0.0.1:{server.port}/classify?top_k=10&"
            answers[served] = [
                httpx.post(f"{address}{query}", content=image.read_bytes(), timeout=60).json()
                for query in QUERIES
                for image in EXAMPLES[:3]
            ]
    for by_onnx, by_torchscript in zip(answers["onnxruntime"], answers["torchscript"], strict=True):
        assert by_onnx["r"] == by_torchscript["r"]
        assert by_onnx["tokens"] == by_torchscript["tokens"]
        assert by_onnx["gmacs"] == pytest.approx(by_torchscript["gmacs"], rel=1e-6)
        expected = {p["label"]: p["probability"] for p in by_onnx["predictions"]}
        found = {p["label"]: p["probability"] for p in by_torchscript["predictions"]}
        assert found == pytest.approx(expected, abs=1e-3)
