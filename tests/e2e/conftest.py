"""The manifest of the reference model, and a server process with the repository's model store."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.store import newest_version
from tests.integration.server import ROOT, Server


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((newest_version("reference") / "manifest.json").read_text())
    return content


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        Server(ROOT / "model_store", tmp_path_factory.mktemp("log") / "server.log") as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client,
    ):
        yield client
