import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import change_byte
from tests.app.store.test_watcher import publish
from tests.app.tiny_store import write_store
from tests.integration.load import Load
from tests.integration.server import Server, wait_until

PNG = encode(make_photo(8, 8), "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    write_store(root)
    return root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(root, tmp_path / "log", reload_seconds=0.1, share_weights=True) as server:
        yield server


def served(server: Server) -> list[str]:
    return [model["version"] for model in json.loads(server.ask("GET", "/models")[1])["models"]]


def opened(server: Server, folder: Path) -> bool:
    """Tell whether the process has a file of a folder mapped or open."""
    files = [str(link.readlink()) for link in Path(f"/proc/{server.process.pid}/fd").iterdir() if link.is_symlink()]
    maps = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
    return str(folder) in maps or any(file.startswith(str(folder)) for file in files)


def test_versions_are_added_and_removed_under_load_without_failed_requests(server: Server, root: Path) -> None:
    with Load(server.port, PNG, n_clients=8, is_kept=True) as load:
        for version in ("2", "3"):
            folder = publish(root, version=version)
            wait_until(lambda wanted=version: load.versions[wanted] >= 20)  # type: ignore[misc]
            assert opened(server, folder)
            shutil.rmtree(folder)
            wait_until(lambda: served(server) == ["1"])
            before = load.versions["1"]
            wait_until(lambda wanted=before + 20: load.versions["1"] >= wanted)  # type: ignore[misc]
            wait_until(lambda gone=folder: not opened(server, gone))  # type: ignore[misc]
    assert set(load.outcomes) == {200}, load.outcomes
    assert set(load.versions) == {"1", "2", "3"}
    metrics = server.ask("GET", "/metrics")[1].decode()
    assert 'dtem_reloads_total{result="loaded"} 2.0' in metrics
    assert 'dtem_reloads_total{result="dropped"} 2.0' in metrics
    assert "Traceback" not in server.log


def test_bad_version_is_refused_under_load_and_served_once_repaired(server: Server, root: Path) -> None:
    with Load(server.port, PNG, n_clients=4, is_kept=True) as load:
        folder = publish(root, spoil=change_byte)
        wait_until(lambda: "refused tiny version 2" in server.log)
        assert served(server) == ["1"]
        change_byte(folder)
        wait_until(lambda: load.versions["2"] >= 20)
    assert set(load.outcomes) == {200}, load.outcomes
    (line,) = [line for line in server.log.splitlines() if "refused tiny version 2" in line]
    assert "tome-r8.onnx" in line
    assert "SHA-256" in line


def test_sighup_rescans_the_store(root: Path, tmp_path: Path) -> None:
    with Server(root, tmp_path / "log", reload_seconds=0) as server:
        publish(root)
        assert server.ask("POST", "/classify", PNG)[0] == 200
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: served(server) == ["1", "2"])
        assert server.stop() == 0
