"""Engines: a new engine is one module and one entry in ENGINES."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from app.backends import ENGINES, BackendOptions, Engine, Outputs, Pixels, Runner, open_backend
from app.errors import SettingsError
from app.main import create_app
from app.observability.metrics import Metrics
from app.serving.service import Service
from app.settings import read_settings
from app.store.loader import StoreOptions
from app.store.start import load_catalogue
from tests.app.odd_images import encode, make_photo
from tests.app.tiny_store import ATM_BIAS, expected_costs, expected_logits

PNG = encode(make_photo(8, 8), "PNG")
NAME = "numpy-onnx"


class NumpyRunner:
    def __init__(self, path: Path, roles: list[str]) -> None:
        self._r = ATM_BIAS if path.stem == "atm" else int(path.stem.removeprefix("tome-r"))
        self._roles = roles

    def run(self, pixels: Pixels) -> Outputs:
        tokens, gmacs = expected_costs(pixels)
        outputs: dict[str, NDArray[Any]] = {
            "logits": expected_logits(pixels, self._r),
            "tokens": tokens,
            "gmacs": gmacs,
        }
        return {role: outputs[role] for role in self._roles}


class NumpyBackend:
    """Computes the graphs of the tiny store in numpy."""

    def __init__(self, options: BackendOptions) -> None:
        assert options.device == "cpu"

    def load(self, path: Path, input_name: str, outputs: Mapping[str, str]) -> Runner:
        return NumpyRunner(path, list(outputs))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A second engine for ONNX files, registered under NAME."""
    module = ModuleType("app.backends.numpy_onnx")
    module.NumpyBackend = NumpyBackend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    engine = Engine(module.__name__, "NumpyBackend", "onnx", "numpy_onnx", "numpy")
    monkeypatch.setitem(ENGINES, NAME, engine)
    return engine


def test_registered_engine_serves_the_graphs_of_its_format(engine: Engine, store: Path) -> None:
    settings = read_settings({"DTEM_ENGINE": NAME, "DTEM_MODEL_STORE": str(store)})
    assert settings.engine == NAME
    backend = open_backend(settings.engine, BackendOptions("cpu", 1, share_weights=False))
    assert isinstance(backend, NumpyBackend)
    catalogue = load_catalogue(store, backend, StoreOptions(engine.graph_format, settings.precision, None))
    variant = catalogue.find(None, None).variant("tome", 16)
    assert variant.spec.format == "onnx"
    assert isinstance(variant.runner, NumpyRunner)
    service = Service(settings, Metrics(CollectorRegistry()))
    with TestClient(create_app(service)) as client:
        service.publish(catalogue)
        assert client.post("/classify?r=16", content=PNG).json()["r"] == 16
        assert client.get("/v2/models/tiny").json()["platform"] == "numpy_onnx"
        assert client.get("/v2/models/tiny/config").json()["backend"] == "numpy"
        assert 'dtem_model_info{device="cpu",format="onnx",model="tiny",version="1"} 1.0' in client.get("/metrics").text


def test_settings_list_a_registered_engine_among_those_accepted(engine: Engine) -> None:
    with pytest.raises(SettingsError, match=f"DTEM_ENGINE=tflite: .*accepted: onnxruntime, torchscript, {NAME}$"):
        read_settings({"DTEM_ENGINE": "tflite"})


def test_settings_refuse_shared_weights_for_an_engine_without_them(engine: Engine) -> None:
    with pytest.raises(SettingsError, match="DTEM_SHARE_WEIGHTS needs DTEM_ENGINE=onnxruntime"):
        read_settings({"DTEM_ENGINE": NAME, "DTEM_SHARE_WEIGHTS": "1"})
