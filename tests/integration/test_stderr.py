"""Stderr has nothing but our log, and the traceback of a crash."""

import json
import signal
from pathlib import Path

import pytest

from tests.app.image_bombs import fax_tiff
from tests.integration.server import Server


def test_tiff_that_libtiff_complains_about_leaves_no_line_but_its_request(server: Server) -> None:
    before = len(server.log)
    for compression in (2, 3, 4):
        assert server.ask("POST", "/classify", fax_tiff(100, 90_000, compression=compression))[0] in (200, 400)
    lines = server.log[before:].splitlines()
    assert {json.loads(line)["message"] for line in lines} == {"request"}


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_traceback_of_a_crash_reaches_stderr(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Server(store, tmp_path / "server.log") as server:
        assert server.stop(number) == -number
        assert "Fatal Python error: " in server.log
        assert "asyncio" in server.log
