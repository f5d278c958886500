"""Runs every code block of `docs/open-inference-protocol.md`, against a model named `reference`."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.app.tiny_store import LABELS, SIDE, write_store
from tests.deploy.ray_server import RayServer
from tests.integration.server import ROOT, Address, Server, on_both

PAGE = (ROOT / "docs" / "open-inference-protocol.md").read_text(encoding="utf-8")
SECONDS = 60
pytestmark = on_both
UNKNOWN_PARAMETER = json.dumps(
    {
        "parameters": {"speed": 1},
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}],
    }
).encode()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A service with a model named `reference`. On the shared cluster it is published only for this module."""
    if request.param == "ray":
        on_ray: RayServer = request.getfixturevalue("ray_server")
        with on_ray.published("reference"):
            yield on_ray
        return
    root = tmp_path_factory.mktemp("reference")
    write_store(root / "store", name="reference")
    with Server(root / "store", root / "server.log") as server:
        yield server


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found


def test_python_blocks_run(
    server: Address, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SERVER", f"127.0.0.1:{server.port}")
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/open-inference-protocol.md", "exec"), names)
    names["client"].close()
    assert names["result"].as_numpy("logits").shape == (4, len(LABELS))
    assert names["result"].get_response()["parameters"]["r"] == 8
    np.testing.assert_array_equal(names["result"].as_numpy("tokens"), [[65, 57, 49]] * 4)
    printed = capsys.readouterr().out
    assert "'r': 16" in printed
    assert re.search(r"\[\[b'0\.\d{6}:\d:\w+' b'0\.\d{6}:\d:\w+'\]\]", printed)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", blocks("bash"))
def test_curl_blocks_run(server: Address, block: str) -> None:
    environment = {**os.environ, "SERVER": f"127.0.0.1:{server.port}", "SIDE": str(SIDE)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace("curl -sS", "curl -sS -w '\\n'")],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=SECONDS,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == block.count("curl")
    for answer in answers:
        assert "error" not in answer
        assert answer["model_name"] == "reference"
        assert {label for item in answer["outputs"] if item["name"] == "label" for label in item["data"]} <= set(LABELS)


def test_page_documents_every_parameter_and_output(server: Address) -> None:
    metadata = json.loads(server.ask("GET", "/v2/models/reference")[1])
    accepted = json.loads(server.ask("POST", "/v2/models/reference/infer", UNKNOWN_PARAMETER)[1])["error"]
    names = [item["name"] for item in metadata["inputs"] + metadata["outputs"]]
    names += re.findall(r"[a-z_]+", accepted.rpartition("Accepted: ")[2])
    assert {"image", "tokens", "r", "timeout"} <= set(names)
    for name in names:
        assert f"`{name}`" in PAGE, name
