import json
from pathlib import Path
from typing import Any

import pytest

from app.backends import BackendOptions, open_backend
from app.store.loader import StoreOptions
from app.store.start import load_catalogue
from benchmarks.servers.partial_store import publish_part, rates_of, reduce_manifest
from tests.app.tiny_store import write_store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("whole"), formats=("onnx", "torchscript"))


@pytest.fixture(scope="module")
def manifest(published: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((published / "manifest.json").read_text())
    return content


def test_the_service_loads_a_store_of_one_variant(published: Path, tmp_path: Path) -> None:
    folder = publish_part(published, tmp_path, lambda one: (one["policy"], one["r"]) == ("tome", 16))
    catalogue = load_catalogue(
        tmp_path, open_backend("onnxruntime", BackendOptions("cpu", 1, False)), StoreOptions("onnx", "float32", None)
    )
    model = catalogue.find(None, None)
    assert list(model.variants) == [("tome", 16, "float32")]
    assert (model.manifest.default.policy, model.manifest.default.r) == ("tome", 16)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "golden.npz",
        "weights.safetensors",
        "tome-r16.onnx",
    }


def test_a_version_can_be_published_under_another_number(published: Path, tmp_path: Path) -> None:
    publish_part(published, tmp_path, lambda one: True)
    folder = publish_part(published, tmp_path, lambda one: True, "7")
    assert folder.name == "7"
    assert json.loads((folder / "manifest.json").read_text())["version"] == "7"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["1", "7"]


def test_the_default_stays_if_it_is_kept(manifest: dict[str, Any]) -> None:
    assert reduce_manifest(manifest, lambda one: one["policy"] == "tome")["default"] == {"policy": "tome", "r": 8}
    assert reduce_manifest(manifest, lambda one: one["r"] == 16)["default"] == {"policy": "tome", "r": 16}


def test_empty_selections_and_unknown_policies_are_refused_with_the_known_ones(manifest: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tome-r16-float32-onnx"):
        reduce_manifest(manifest, lambda one: one["r"] == 3)
    assert rates_of(manifest, "tome") == [0, 8, 16]
    for policy in ("atm", "nope"):
        with pytest.raises(ValueError, match=r"expected one of \['none', 'tome'\]"):
            rates_of(manifest, policy)
