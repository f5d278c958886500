import errno
import gc
import logging
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import app.store.scan as scan_module
from app.backends import BackendOptions, open_backend
from app.errors import TemporaryStoreError
from app.observability.record import RequestRecord
from app.settings import Settings
from app.store.catalogue import ServedModel
from app.store.loader import StoreOptions, load_version
from app.store.refusals import RETRY_SECONDS
from app.store.scan import Scan
from app.store.selection import Query, select
from app.store.start import load_catalogue
from app.store.watcher import Watcher
from tests.app.api.test_models import sample
from tests.app.conftest import ClientFactory, wait_until
from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import change_byte
from tests.app.tiny_store import write_store

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 30
SHARING = BackendOptions("cpu", 1, share_weights=True)


class Deployment:
    """A store, the service that serves it, and the watcher between them, which scans only on demand."""

    def __init__(self, root: Path, make_client: ClientFactory, **settings: object) -> None:
        self.root = root
        backend = open_backend("onnxruntime", SHARING)
        given = Settings.model_validate({"model_store": root, "reload_seconds": 0, "device": "cpu", **settings})
        options = StoreOptions("onnx", "float32", given.default_model)
        self.client: Any = make_client(None, **settings)
        self.n_loads = 0

        def load(folder: Path) -> ServedModel:
            self.n_loads += 1
            return load_version(folder, backend, options, n_threads=1)

        service = self.client.service  # type: ignore[attr-defined]
        self.watcher = Watcher(
            given, load_catalogue(root, backend, options), load, service.publish, service.metrics.count_reload
        )
        service.publish(self.watcher.catalogue)
        self.watcher.update()

    @property
    def served(self) -> list[str]:
        return [f"{model['name']}/{model['version']}" for model in self.client.get("/models").json()["models"]]

    def counted(self, result: str) -> float:
        return sample(self.client, f'dtem_reloads_total{{result="{result}"}}')

    def serving_version(self, query: str = "") -> str:
        """Classify an image; return the model and version of the response."""
        model = self.client.post(f"/classify{query}", content=PNG).json()["model"]
        return f"{model['name']}/{model['version']}"


@pytest.fixture
def deployment(tmp_path: Path, make_client: ClientFactory) -> Deployment:
    write_store(tmp_path)
    return Deployment(tmp_path, make_client)


def publish(root: Path, name: str = "tiny", version: str = "2", spoil: Callable[[Path], object] = bool) -> Path:
    """Write a version under a temporary name and rename it, as exports do."""
    written = write_store(root / ".writing", name, version)
    spoil(written)
    folder = root / name / version
    folder.parent.mkdir(exist_ok=True)
    return written.rename(folder)


def test_new_version_becomes_the_default(deployment: Deployment) -> None:
    publish(deployment.root)
    deployment.watcher.update()
    assert deployment.served == ["tiny/1", "tiny/2"]
    assert (deployment.serving_version(), deployment.serving_version("?version=1")) == ("tiny/2", "tiny/1")
    assert sample(deployment.client, 'dtem_model_info{device="cpu",format="onnx",model="tiny",version="2"}') == 1
    assert (deployment.counted("loaded"), deployment.counted("refused"), deployment.counted("dropped")) == (1, 0, 0)
    deployment.watcher.update()
    assert deployment.n_loads == 1


def test_corrupt_version_is_refused_once_and_the_old_one_still_served(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    publish(deployment.root, spoil=change_byte)
    for _ in range(3):
        deployment.watcher.update()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    for word in ("refused tiny version 2", "tome-r8.onnx", "SHA-256"):
        assert word in record.getMessage()
    assert (deployment.n_loads, deployment.counted("refused"), deployment.served) == (1, 1, ["tiny/1"])
    assert deployment.serving_version() == "tiny/1"


def test_repaired_version_is_retried(deployment: Deployment) -> None:
    folder = publish(deployment.root, spoil=change_byte)
    deployment.watcher.update()
    # Flips the same bit back.
    change_byte(folder)
    # Independent of the resolution of file times.
    os.utime(folder / "tome-r8.onnx", ns=(1, 1))
    deployment.watcher.update()
    assert (deployment.served, deployment.serving_version()) == (["tiny/1", "tiny/2"], "tiny/2")


def test_refused_version_is_retried_when_published_again(deployment: Deployment) -> None:
    folder = publish(deployment.root, spoil=change_byte)
    deployment.watcher.update()
    shutil.rmtree(folder)
    deployment.watcher.update()
    publish(deployment.root)
    deployment.watcher.update()
    assert deployment.served == ["tiny/1", "tiny/2"]


def test_unexpected_failure_refuses_only_that_version(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    def fail(folder: Path) -> ServedModel:
        raise MemoryError("no room")

    deployment.watcher._load = fail
    publish(deployment.root)
    publish(deployment.root, version="3")
    deployment.watcher.update()
    assert (deployment.counted("refused"), deployment.served) == (2, ["tiny/1"])
    assert "Traceback" in caplog.text


def test_removed_version_is_dropped(deployment: Deployment) -> None:
    folder = publish(deployment.root)
    deployment.watcher.update()
    shutil.rmtree(folder)
    deployment.watcher.update()
    assert (deployment.served, deployment.serving_version()) == (["tiny/1"], "tiny/1")
    assert deployment.client.post("/classify?version=2", content=PNG).status_code == 404
    assert deployment.counted("dropped") == 1
    assert 'model="tiny",version="2"' not in deployment.client.get("/metrics").text
    publish(deployment.root)
    deployment.watcher.update()
    assert deployment.serving_version() == "tiny/2"


def test_last_version_of_the_default_model_is_kept(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(deployment.root / "tiny" / "1")
    for _ in range(3):
        deployment.watcher.update()
    assert (deployment.served, deployment.serving_version(), deployment.counted("dropped")) == (["tiny/1"], "tiny/1", 0)
    assert (
        len(
            [
                record
                for record in caplog.records
                if "still serving tiny version 1, whose folder is gone" in record.message
            ]
        )
        == 1
    )
    publish(deployment.root)
    deployment.watcher.update()
    assert (deployment.served, deployment.counted("dropped")) == (["tiny/2"], 1)


def test_version_replaced_by_a_corrupt_one_is_kept(deployment: Deployment) -> None:
    shutil.rmtree(deployment.root / "tiny" / "1")
    publish(deployment.root, spoil=change_byte)
    deployment.watcher.update()
    assert (deployment.served, deployment.counted("refused")) == (["tiny/1"], 1)


def test_changed_files_of_a_served_version_are_ignored_with_one_warning(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    change_byte(deployment.root / "tiny" / "1")
    os.utime(deployment.root / "tiny" / "1" / "tome-r8.onnx", ns=(1, 1))
    for _ in range(3):
        deployment.watcher.update()
    assert (
        len(
            [
                record
                for record in caplog.records
                if "ignored changed files of tiny version 1: versions are immutable" in record.message
            ]
        )
        == 1
    )
    assert (deployment.n_loads, deployment.serving_version()) == (0, "tiny/1")


def test_default_model_stays_when_another_is_published(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    publish(deployment.root, name="alpha", version="7")
    deployment.watcher.update()
    assert (deployment.served, deployment.serving_version()) == (["alpha/7", "tiny/1"], "tiny/1")
    assert deployment.serving_version("?model=alpha") == "alpha/7"
    assert deployment.client.get("/models").json()["default"] == {"name": "tiny", "version": "1"}
    assert sample(deployment.client, 'dtem_default_model_info{model="tiny",version="1"}') == 1
    assert "the default model stays tiny; set DTEM_DEFAULT_MODEL, since alpha is another model" in caplog.text
    publish(deployment.root, name="zeta", version="1")
    shutil.rmtree(deployment.root / "alpha")
    shutil.rmtree(deployment.root / "tiny")
    deployment.watcher.update()
    assert (deployment.served, deployment.serving_version()) == (["tiny/1", "zeta/1"], "tiny/1")


def test_configured_default_model_stays_the_default(tmp_path: Path, make_client: ClientFactory) -> None:
    write_store(tmp_path)
    deployment = Deployment(tmp_path, make_client, default_model="tiny")
    publish(tmp_path, name="alpha")
    deployment.watcher.update()
    assert (deployment.served, deployment.serving_version()) == (["alpha/2", "tiny/1"], "tiny/1")
    shutil.rmtree(tmp_path / "tiny")
    deployment.watcher.update()
    assert deployment.served == ["alpha/2", "tiny/1"]


def test_refused_version_is_shown_until_it_is_gone(deployment: Deployment) -> None:
    folder = publish(deployment.root, spoil=change_byte)
    (deployment.root / "tiny" / "v3").mkdir()
    deployment.watcher.update()
    document = deployment.client.get("/models").json()
    (refused,), (ignored,) = document["refused"], document["ignored"]
    assert (refused["name"], refused["version"], refused["reason"][:20]) == ("tiny", "2", "tome-r8.onnx: SHA-25")
    assert ignored["folder"] == "tiny/v3"
    index = deployment.client.post("/v2/repository/index").json()
    assert index[1:] == [{**refused, "state": "UNAVAILABLE"}]
    assert sample(deployment.client, 'dtem_refused_versions{model="tiny"}') == 1
    shutil.rmtree(folder)
    (deployment.root / "tiny" / "v3").rmdir()
    deployment.watcher.update()
    document = deployment.client.get("/models").json()
    assert (document["refused"], document["ignored"]) == ([], [])
    assert sample(deployment.client, 'dtem_refused_versions{model="tiny"}') == 0


def test_misnamed_folder_is_logged_once(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    (deployment.root / "tiny" / "latest").mkdir()
    for _ in range(3):
        deployment.watcher.update()
    assert [record.getMessage().rpartition("/")[2] for record in caplog.records if "ignored" in record.message] == [
        "latest: not a version number; accepted: [1-9][0-9]{0,8}"
    ]


def test_version_refused_for_a_passing_reason_is_tried_again(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    load = deployment.watcher._load

    def fail(folder: Path) -> ServedModel:
        deployment.n_loads += 1
        raise TemporaryStoreError(folder, "Permission denied")

    deployment.watcher._load = fail
    publish(deployment.root)
    for seconds in (0.0, RETRY_SECONDS - 1, RETRY_SECONDS + 1):
        now = seconds
        deployment.watcher.update()
    assert (deployment.n_loads, deployment.counted("refused"), caplog.text.count("refused tiny version 2")) == (2, 1, 1)
    deployment.watcher._load = load
    now = 3 * RETRY_SECONDS
    deployment.watcher.update()
    assert deployment.served == ["tiny/1", "tiny/2"]


def test_model_whose_folder_cannot_be_read_stays_served(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Path, found: Scan) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(scan_module, "_scan_model", fail)
    deployment.watcher.update()
    assert deployment.served == ["tiny/1"]
    assert deployment.client.get("/models").json()["ignored"] == [
        {"folder": "tiny", "reason": "cannot be read: Permission denied"}
    ]


def test_unreadable_store_drops_nothing(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    publish(deployment.root)
    deployment.watcher.update()
    away = deployment.root.rename(deployment.root.with_name("away"))
    for _ in range(3):
        deployment.watcher.update()
    assert deployment.served == ["tiny/1", "tiny/2"]
    assert len([record for record in caplog.records if "cannot read the model store" in record.message]) == 1
    away.rename(deployment.root)
    shutil.rmtree(deployment.root / "tiny" / "2")
    deployment.watcher.update()
    assert deployment.served == ["tiny/1"]


def test_dropped_version_is_freed(deployment: Deployment) -> None:
    folder = publish(deployment.root)
    deployment.watcher.update()
    assert deployment.serving_version() == "tiny/2"
    # Its weights are memory-mapped.
    assert str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")
    model = deployment.client.service.require_ready().find("tiny", "2")
    variant = model.variant("tome", 8)
    references = [weakref.ref(variant), weakref.ref(variant.runner), weakref.ref(model)]
    del model, variant
    shutil.rmtree(folder)
    deployment.watcher.update()
    # The engine drops its references to the previous run.
    assert deployment.serving_version() == "tiny/1"
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_requests_in_flight_keep_their_variant(deployment: Deployment) -> None:
    folder = publish(deployment.root)
    deployment.watcher.update()
    service = deployment.client.service
    chosen = select(service.require_ready(), Query(version="2"))
    shutil.rmtree(folder)
    deployment.watcher.update()
    assert deployment.client.portal is not None
    (found,) = deployment.client.portal.call(service.infer, chosen, [np.zeros((8, 8, 3), np.uint8)], RequestRecord())
    assert found.outputs["logits"].shape == (3,)


@pytest.fixture
def running(deployment: Deployment) -> Iterator[Deployment]:
    deployment.watcher._seconds = 0.01
    deployment.watcher.start()
    yield deployment
    assert deployment.watcher.stop(SECONDS)


def test_no_request_fails_while_versions_change(running: Deployment) -> None:
    failures: list[str] = []
    answers: set[str] = set()
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            response = running.client.post("/classify", content=PNG)
            if response.status_code == 200:
                answers.add(response.json()["model"]["version"])
            else:
                failures.append(response.text)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in ("2", "3", "4"):
        folder = publish(running.root, version=version, spoil=change_byte if version == "3" else bool)
        if version == "3":
            wait_until(lambda: running.counted("refused") == 1)
        else:
            wait_until(lambda wanted=version: wanted in answers)  # type: ignore[misc]
        shutil.rmtree(folder)
    wait_until(lambda: running.counted("dropped") == 2)
    done.set()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    assert {"2", "4"} <= answers
    assert running.served == ["tiny/1"]


def test_scans_continue_after_a_failed_one(running: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    real = running.watcher._scan

    def fail_once() -> Any:
        if failed.is_set():
            return real()
        failed.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(running.watcher, "_scan", fail_once)
    assert failed.wait(SECONDS)
    publish(running.root)
    wait_until(lambda: running.served == ["tiny/1", "tiny/2"])


def test_watcher_without_an_interval_scans_on_demand(deployment: Deployment) -> None:
    n_scans = 0
    scanned = threading.Event()
    real = deployment.watcher.update

    def update() -> None:
        nonlocal n_scans
        real()
        n_scans += 1
        scanned.set()

    deployment.watcher.update = update  # type: ignore[method-assign]
    deployment.watcher.start()
    # At the start, because the store may have changed during loading.
    assert scanned.wait(SECONDS)
    scanned.clear()
    publish(deployment.root)
    deployment.watcher.scan_soon()
    assert scanned.wait(SECONDS)
    assert (deployment.served, n_scans) == (["tiny/1", "tiny/2"], 2)
    assert deployment.watcher.stop(SECONDS)


def test_stop_before_start_is_allowed(deployment: Deployment) -> None:
    assert deployment.watcher.stop(SECONDS)
