import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import BREAKAGES, change_byte
from tests.app.store.test_watcher import publish
from tests.app.tiny_store import write_store
from tests.integration.server import Server, wait_until
from tests.integration.test_start_and_stop import assert_one_error_line, run_failing

PNG = encode(make_photo(8, 8), "PNG")


def truncate_graph(folder: Path) -> None:
    os.truncate(folder / "tome-r8.onnx", 100)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "tiny/2": (truncate_graph, "tome-r8.onnx: has 100 bytes"),
    "tiny/3": (BREAKAGES["not JSON"][0], "manifest.json: Invalid JSON"),
    "tiny/4": (BREAKAGES["wrong golden"][0], "golden logits differ by 0.5"),
    "tiny/5": (BREAKAGES["FIFO"][0], "tome-r8.onnx: is a FIFO, expected a regular file"),
    "tiny/6": (BREAKAGES["broken graph"][0], "tome-r16.onnx: ONNX Runtime cannot load the graph"),
    "other/1": (BREAKAGES["unknown task"][0], "manifest.json: task: 'dream' is not served"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of one good and six bad versions, and a misnamed folder."""
    root = tmp_path / "store"
    write_store(root)
    for name, (spoil, _) in BAD.items():
        model, _, version = name.partition("/")
        spoil(write_store(root, model, version))
    (root / "tiny" / "latest").symlink_to("1")
    return root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(root, tmp_path / "log", reload_seconds=0.1) as server:
        yield server


def models(server: Server) -> Any:
    return json.loads(server.ask("GET", "/models")[1])


def answer(server: Server, query: str = "") -> str:
    model = json.loads(server.ask("POST", f"/classify{query}", PNG)[1])["model"]
    return f"{model['name']}/{model['version']}"


def test_start_serves_the_good_version_and_names_the_bad_ones(server: Server, root: Path) -> None:
    assert answer(server) == "tiny/1"
    document = models(server)
    assert document["default"] == {"name": "tiny", "version": "1"}
    reasons = {f"{refused['name']}/{refused['version']}": refused["reason"] for refused in document["refused"]}
    assert reasons.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in reasons[name]
        (line,) = [line for line in server.log.splitlines() if f"refused {name.replace('/', ' version ')} " in line]
        assert reason in line
    assert [ignored["folder"] for ignored in document["ignored"]] == ["tiny/latest"]
    assert server.log.count("ignored folder") == 1
    assert server.series('dtem_reloads_total{result="refused"}') == [6.0]
    assert server.series('dtem_refused_versions{model="other"}') == [1.0]
    assert server.series('dtem_refused_versions{model="tiny"}') == [5.0]
    # The FIFO did not stop the watcher either.
    publish(root, version="7")
    wait_until(lambda: answer(server) == "tiny/7")


def test_second_model_changes_nothing_for_clients_that_name_none(server: Server, root: Path, tmp_path: Path) -> None:
    publish(root, name="mine", version="9")
    wait_until(lambda: len(models(server)["models"]) == 2)
    assert (answer(server), answer(server, "?model=mine")) == ("tiny/1", "mine/9")
    assert server.series('dtem_default_model_info{model="tiny",version="1"}') == [1.0]
    assert "the default model stays tiny" in server.log
    with Server(root, tmp_path / "restarted", default_model="tiny") as restarted:
        assert (answer(restarted), answer(restarted, "?model=mine")) == ("tiny/1", "mine/9")
        assert restarted.series('dtem_default_model_info{model="tiny",version="1"}') == [1.0]
        assert restarted.series("dtem_default_model_configured") == [1.0]
    with Server(root, tmp_path / "unnamed") as restarted:
        assert answer(restarted) == "tiny/1"
        assert "the default model is tiny, the oldest; set DTEM_DEFAULT_MODEL" in restarted.log


def test_start_ends_if_the_default_model_has_no_good_version(root: Path) -> None:
    publish(root, name="mine", version="9")
    change_byte(root / "tiny" / "1")
    status, errors = run_failing(model_store=root, port=0, default_model="tiny")
    assert status == 1
    assert_one_error_line(errors, "tiny/6", "tome-r16.onnx: ONNX Runtime cannot load the graph")
