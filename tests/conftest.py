"""Fixtures and rules for all tests: a test that needs a tool which is missing here is skipped, or fails on request."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.app.tiny_store import write_store

if TYPE_CHECKING:
    from tests.deploy.ray_server import RayServer

REQUIRE_TOOLS = "--require-tools"
# Besides Docker; `.ci/containers` installs them.
PROGRAMS = ("prometheus", "promtool", "kubectl", "wrk", "nginx", "haproxy", "java", "node", "curl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        REQUIRE_TOOLS,
        action="store_true",
        help="fail, instead of skipping, a test that needs a GPU, chromium, or what .ci/containers installs",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [tool for marker, find in TOOLS.items() if item.get_closest_marker(marker) for tool in find()]
    if not missing:
        return
    reason = f"missing here: {', '.join(missing)}"
    if item.config.getoption(REQUIRE_TOOLS):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@cache
def missing_for_gpu() -> tuple[str, ...]:
    # Imported late: it takes seconds, which other tests need not pay.
    torch = importlib.import_module("torch")
    return () if torch.cuda.is_available() else ("a CUDA device",)


@cache
def missing_for_containers() -> tuple[str, ...]:
    """Name what `.ci/containers` would provide."""
    missing = [] if _succeeds("docker", "info") else ["a Docker engine that answers"]
    if not _succeeds("docker", "compose", "version") and shutil.which("docker-compose") is None:
        missing.append("Docker Compose")
    return (*missing, *_missing_programs(*PROGRAMS))


@cache
def missing_for_browsers() -> tuple[str, ...]:
    return _missing_programs("chromium")


def _succeeds(program: str, *arguments: str) -> bool:
    path = shutil.which(program)
    return path is not None and subprocess.run([path, *arguments], capture_output=True, check=False).returncode == 0


def _missing_programs(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if shutil.which(name) is None)


TOOLS: dict[str, Callable[[], tuple[str, ...]]] = {
    "gpu": missing_for_gpu,
    "container": missing_for_containers,
    "browser": missing_for_browsers,
}


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    """Start one Ray cluster for all tests; a test that changes it restores two nodes, two replicas and one model."""
    root = tmp_path_factory.mktemp("store")
    write_store(root)
    # Imported late: a machine for GPU tests need not have what it imports.
    server_class: type[RayServer] = importlib.import_module("tests.deploy.ray_server").RayServer
    with server_class(root, max_body_bytes=1_000_000, reload_seconds=0.2, default_model="tiny") as server:
        yield server
