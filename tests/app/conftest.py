import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from app.backends import BackendOptions, open_backend
from app.main import create_app
from app.observability.metrics import Metrics
from app.serving.service import Service
from app.settings import Settings
from app.store.catalogue import Catalogue
from app.store.loader import StoreOptions
from app.store.start import load_catalogue
from tests.app.tiny_store import read_manifest, write_manifest, write_store

# Timeout; a test that reaches it has failed.
SECONDS = 30
OPTIONS = BackendOptions("cpu", 1, share_weights=False)
ONNX = StoreOptions("onnx", "float32", None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the tiny model; read-only."""
    root = tmp_path_factory.mktemp("store")
    write_store(root)
    return root


@pytest.fixture(scope="session")
def catalogue(store: Path) -> Catalogue:
    return load_catalogue(store, open_backend("onnxruntime", OPTIONS), ONNX)


@pytest.fixture(scope="session")
def independent_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The tiny model with labels that are independent of each other."""
    root = tmp_path_factory.mktemp("independent")
    folder = write_store(root)
    manifest = read_manifest(folder)
    manifest["output"]["activation"] = "sigmoid"
    write_manifest(folder, manifest)
    return load_catalogue(root, open_backend("onnxruntime", OPTIONS), ONNX)


ClientFactory = Callable[..., TestClient]


@pytest.fixture
def make_client(catalogue: Catalogue) -> Iterator[ClientFactory]:
    """Make clients, each of a new service with the given settings; the service is `client.service`."""
    clients: list[TestClient] = []

    def make(served: Catalogue | None = catalogue, **settings: object) -> TestClient:
        service = Service(Settings.model_validate(settings), Metrics(CollectorRegistry()))
        client = TestClient(create_app(service), raise_server_exceptions=False)
        client.service = service  # type: ignore[attr-defined]
        clients.append(client.__enter__())
        if served is not None:
            service.publish(served)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client: ClientFactory) -> TestClient:
    return make_client()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
