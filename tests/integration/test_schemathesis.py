"""The OpenAPI document against the server, by a tool that others wrote: every request that it can think of."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.server import ROOT, Server


@pytest.mark.slow
def test_no_answer_contradicts_the_document(server: Server, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("schemathesis")
    command = [
        str(tool),
        "--config-file",
        str(ROOT / "schemathesis.toml"),
        "run",
        "--seed",
        "1",
        "--max-examples",
        "30",
    ]
    address = f"http://127.0.0.1:{server.port}/openapi.json"
    done = subprocess.run([*command, address], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
