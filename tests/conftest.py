from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.app.tiny_store import write_store

if TYPE_CHECKING:
    from tests.deploy.ray_server import RayServer


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch  # noqa: PLC0415  # seconds, which tests of the service alone need not wait

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    """One cluster for all; who changes it leaves two nodes and two replicas, with the tiny model alone."""
    from tests.deploy.ray_server import RayServer  # noqa: PLC0415  # it needs more than a GPU machine has

    root = tmp_path_factory.mktemp("store")
    write_store(root)
    with RayServer(root, max_body_bytes=1_000_000, reload_seconds=0.2, default_model="tiny") as server:
        yield server
