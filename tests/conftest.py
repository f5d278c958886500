from collections.abc import Iterator

import pytest

from tests.app.tiny_store import write_store
from tests.deploy.ray_server import RayServer


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    """One cluster for all; who changes it leaves two nodes and two replicas, with the tiny model alone."""
    root = tmp_path_factory.mktemp("store")
    write_store(root)
    with RayServer(root, max_body_bytes=1_000_000, reload_seconds=0.2, default_model="tiny") as server:
        yield server
