"""The commands of docs/own-model.md, as they stand there."""

import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server import ROOT

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
DTEM = f"{shlex.quote(sys.executable)} -W error -m dtem"


def find_commands() -> tuple[str, str, str, str]:
    """Return the commands that make a model, prepare it, serve it and ask it."""
    page = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    _, make, prepare, serve, ask = (block.replace(".venv/bin/dtem", DTEM) for block in BLOCK.findall(page))
    return make.replace(".venv/bin/python examples", f"{sys.executable} {ROOT}/examples"), prepare, serve, ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the model was made and prepared, with the output in `log`."""
    folder = tmp_path_factory.mktemp("own")
    make, prepare, _, _ = find_commands()
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    for command in (make, prepare):
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        (folder / "log").write_text(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    serve = f"exec {find_commands()[2].strip()} --port 0"
    with subprocess.Popen(serve, shell=True, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("ready: ").strip()
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prepared_model_answers_right(folder: Path, address: str) -> None:
    path = find_commands()[3].split("'")[1].partition("/classify")[2]
    answers = []
    for name in ("four", "one", "three", "two", "zero"):
        for image in sorted((folder / "own/val" / name).glob("*.jpg"))[:8]:
            request = urllib.request.Request(f"{address}/classify{path}", image.read_bytes())
            with urllib.request.urlopen(request) as response:
                answers.append((name, json.load(response)["predictions"][0]["label"]))
    assert sum(expected == found for expected, found in answers) >= 36, answers


@pytest.mark.slow
def test_prepare_ends_with_the_table_the_picture_and_the_request(folder: Path) -> None:
    log = (folder / "log").read_text()
    accuracy = re.search(r"^accuracy: top-1 ([\d.]+) % .* unmerged", log, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 97
    policies = re.findall(r"^\| (none|tome|atm) \| (\S+) \|", log, re.MULTILINE)
    assert policies == [("none", "0"), ("tome", "8"), ("tome", "16"), ("atm", "adapts")]
    assert "curl --data-binary @image.jpg 'http://127.0.0.1:8000/classify?model=own&r=8'" in log
    assert (folder / "own/run/summary.png").stat().st_size > 10_000
    assert max(map(len, log.splitlines())) < 400


@pytest.mark.slow
def test_manifest_says_whose_model_it_is(folder: Path) -> None:
    manifest = json.loads((folder / "own/store/own/1/manifest.json").read_text())
    assert manifest["labels"] == ["four", "one", "three", "two", "zero"]
    assert "digits" not in json.dumps(manifest["training"]).lower()
    assert manifest["input"]["mean"] == [0.485, 0.456, 0.406]
    assert manifest["input"]["resize_height"] == manifest["input"]["height"] == 112
