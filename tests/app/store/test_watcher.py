import gc
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.backends import BackendOptions, open_backend
from app.observability.record import RequestRecord
from app.settings import Settings
from app.store.catalogue import ServedModel
from app.store.loader import StoreOptions, load_catalogue, load_version
from app.store.selection import Query, select
from app.store.watcher import Watcher
from tests.app.api.test_models import sample
from tests.app.conftest import ClientFactory, wait_until
from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import change_byte
from tests.app.tiny_store import write_store

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 30
SHARING = BackendOptions("cpu", 1, share_weights=True)


class Stage:
    """A store, a service that serves it, and the watcher between them; it looks when it is told to."""

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

    def answer(self, query: str = "") -> str:
        """Return the model and version that answer."""
        model = self.client.post(f"/classify{query}", content=PNG).json()["model"]
        return f"{model['name']}/{model['version']}"


@pytest.fixture
def stage(tmp_path: Path, make_client: ClientFactory) -> Stage:
    write_store(tmp_path)
    return Stage(tmp_path, make_client)


def publish(root: Path, name: str = "tiny", version: str = "2", spoil: Callable[[Path], object] = bool) -> Path:
    """Write a version elsewhere and rename it to its place, as exports do."""
    written = write_store(root / ".writing", name, version)
    spoil(written)
    folder = root / name / version
    folder.parent.mkdir(exist_ok=True)
    return written.rename(folder)


def test_a_new_version_takes_over(stage: Stage) -> None:
    publish(stage.root)
    stage.watcher.update()
    assert stage.served == ["tiny/1", "tiny/2"]
    assert (stage.answer(), stage.answer("?version=1")) == ("tiny/2", "tiny/1")
    assert sample(stage.client, 'dtem_model_info{device="cpu",format="onnx",model="tiny",version="2"}') == 1
    assert (stage.counted("loaded"), stage.counted("refused"), stage.counted("dropped")) == (1, 0, 0)
    stage.watcher.update()
    assert stage.n_loads == 1


def test_a_bad_version_is_refused_once_and_the_old_one_serves(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    publish(stage.root, spoil=change_byte)
    for _ in range(3):
        stage.watcher.update()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    for word in ("refused tiny version 2", "tome-r8.onnx", "SHA-256"):
        assert word in record.getMessage()
    assert (stage.n_loads, stage.counted("refused"), stage.served) == (1, 1, ["tiny/1"])
    assert stage.answer() == "tiny/1"


def test_a_repaired_version_is_tried_again(stage: Stage) -> None:
    folder = publish(stage.root, spoil=change_byte)
    stage.watcher.update()
    change_byte(folder)  # the same bit, back
    os.utime(folder / "tome-r8.onnx", ns=(1, 1))  # however coarse the clock of the file system
    stage.watcher.update()
    assert (stage.served, stage.answer()) == (["tiny/1", "tiny/2"], "tiny/2")


def test_a_version_refused_and_published_anew_is_tried_again(stage: Stage) -> None:
    folder = publish(stage.root, spoil=change_byte)
    stage.watcher.update()
    shutil.rmtree(folder)
    stage.watcher.update()
    publish(stage.root)
    stage.watcher.update()
    assert stage.served == ["tiny/1", "tiny/2"]


def test_an_unforeseen_failure_refuses_the_version_only(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    def fail(folder: Path) -> ServedModel:
        raise MemoryError("no room")

    stage.watcher._load = fail
    publish(stage.root)
    publish(stage.root, version="3")
    stage.watcher.update()
    assert (stage.counted("refused"), stage.served) == (2, ["tiny/1"])
    assert "Traceback" in caplog.text


def test_a_version_that_disappears_is_dropped(stage: Stage) -> None:
    folder = publish(stage.root)
    stage.watcher.update()
    shutil.rmtree(folder)
    stage.watcher.update()
    assert (stage.served, stage.answer()) == (["tiny/1"], "tiny/1")
    assert stage.client.post("/classify?version=2", content=PNG).status_code == 404
    assert stage.counted("dropped") == 1
    assert 'model="tiny",version="2"' not in stage.client.get("/metrics").text
    publish(stage.root)
    stage.watcher.update()
    assert stage.answer() == "tiny/2"


def test_the_last_version_of_the_default_model_is_kept(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(stage.root / "tiny" / "1")
    for _ in range(3):
        stage.watcher.update()
    assert (stage.served, stage.answer(), stage.counted("dropped")) == (["tiny/1"], "tiny/1", 0)
    assert len([record for record in caplog.records if "stays served" in record.message]) == 1
    publish(stage.root)
    stage.watcher.update()
    assert (stage.served, stage.counted("dropped")) == (["tiny/2"], 1)


def test_a_version_replaced_by_a_bad_one_is_kept(stage: Stage) -> None:
    shutil.rmtree(stage.root / "tiny" / "1")
    publish(stage.root, spoil=change_byte)
    stage.watcher.update()
    assert (stage.served, stage.counted("refused")) == (["tiny/1"], 1)


def test_files_that_change_under_a_served_version_are_ignored_with_one_warning(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    change_byte(stage.root / "tiny" / "1")
    os.utime(stage.root / "tiny" / "1" / "tome-r8.onnx", ns=(1, 1))
    for _ in range(3):
        stage.watcher.update()
    assert len([record for record in caplog.records if "immutable" in record.message]) == 1
    assert (stage.n_loads, stage.answer()) == (0, "tiny/1")


def test_other_models_come_and_go(stage: Stage) -> None:
    publish(stage.root, name="alpha", version="7")
    stage.watcher.update()
    assert (stage.served, stage.answer()) == (["alpha/7", "tiny/1"], "alpha/7")  # the first by name
    publish(stage.root, name="zeta", version="1")
    shutil.rmtree(stage.root / "tiny")
    stage.watcher.update()
    assert stage.served == ["alpha/7", "zeta/1"]


def test_the_configured_default_model_stays_the_default(tmp_path: Path, make_client: ClientFactory) -> None:
    write_store(tmp_path)
    stage = Stage(tmp_path, make_client, default_model="tiny")
    publish(tmp_path, name="alpha")
    stage.watcher.update()
    assert (stage.served, stage.answer()) == (["alpha/2", "tiny/1"], "tiny/1")
    shutil.rmtree(tmp_path / "tiny")
    stage.watcher.update()
    assert stage.served == ["alpha/2", "tiny/1"]


def test_a_store_that_cannot_be_read_drops_nothing(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    publish(stage.root)
    stage.watcher.update()
    away = stage.root.rename(stage.root.with_name("away"))
    for _ in range(3):
        stage.watcher.update()
    assert stage.served == ["tiny/1", "tiny/2"]
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    away.rename(stage.root)
    shutil.rmtree(stage.root / "tiny" / "2")
    stage.watcher.update()
    assert stage.served == ["tiny/1"]


def test_a_dropped_version_leaves_nothing_behind(stage: Stage) -> None:
    folder = publish(stage.root)
    stage.watcher.update()
    assert stage.answer() == "tiny/2"
    assert str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")  # its weights are mapped
    model = stage.client.service.require_ready().find("tiny", "2")
    variant = model.variant("tome", 8)
    references = [weakref.ref(variant), weakref.ref(variant.runner), weakref.ref(model)]
    del model, variant
    shutil.rmtree(folder)
    stage.watcher.update()
    assert stage.answer() == "tiny/1"  # the engine has let go of the run before
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_requests_inside_keep_the_variant_they_have(stage: Stage) -> None:
    folder = publish(stage.root)
    stage.watcher.update()
    service = stage.client.service
    chosen = select(service.require_ready(), Query(version="2"))
    shutil.rmtree(folder)
    stage.watcher.update()
    assert stage.client.portal is not None
    (found,) = stage.client.portal.call(service.infer, chosen, [np.zeros((8, 8, 3), np.uint8)], RequestRecord())
    assert found.outputs["logits"].shape == (3,)


@pytest.fixture
def running(stage: Stage) -> Iterator[Stage]:
    stage.watcher._seconds = 0.01
    stage.watcher.start()
    yield stage
    assert stage.watcher.stop(SECONDS)


def test_no_request_fails_while_versions_come_and_go(running: Stage) -> None:
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


def test_a_look_that_fails_is_not_the_last(running: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    real = running.watcher._scan

    def fail_once() -> Any:
        if failed.is_set():
            return real()
        failed.set()
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(running.watcher, "_scan", fail_once)
    assert failed.wait(SECONDS)
    publish(running.root)
    wait_until(lambda: running.served == ["tiny/1", "tiny/2"])


def test_without_an_interval_it_looks_when_it_is_told_to(stage: Stage) -> None:
    looks: list[None] = []
    looked = threading.Event()
    real = stage.watcher.update

    def look() -> None:
        real()
        looks.append(None)
        looked.set()

    stage.watcher.update = look  # type: ignore[method-assign]
    stage.watcher.start()
    assert looked.wait(SECONDS)  # once at the start: something may have come while the store was loaded
    looked.clear()
    publish(stage.root)
    stage.watcher.scan_soon()
    assert looked.wait(SECONDS)
    assert (stage.served, len(looks)) == (["tiny/1", "tiny/2"], 2)
    assert stage.watcher.stop(SECONDS)


def test_stop_before_start_is_no_mistake(stage: Stage) -> None:
    assert stage.watcher.stop(SECONDS)
