from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.tiny_store import write_store
from tests.integration.server import Address, Server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, formats=("onnx", "torchscript"))
    return root


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The service as a process, and in modules marked with `on_both` also on a Ray cluster."""
    if getattr(request, "param", "process") == "ray":
        yield request.getfixturevalue("ray_server")
        return
    with Server(store, tmp_path_factory.mktemp("log") / "server.log", max_body_bytes=1_000_000) as server:
        yield server
