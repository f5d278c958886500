import os
import signal
import sys
from pathlib import Path

import pytest

from deploy.local import process
from deploy.local.process import LaunchError, ServerProcess, environment

SERVER = """
import http.server, signal, sys
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print(f"ready: http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def python(code: str, log: Path) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", code], log, environment())


def test_a_server_is_ready_when_it_announces_its_port_and_gone_at_the_end(tmp_path: Path) -> None:
    with python(SERVER, tmp_path / "log") as server:
        assert server.get("/README.md")[0] == 200
        assert server.output == f"ready: http://127.0.0.1:{server.port}\n"
        assert "GET /README.md" in server.log
        assert server.resident_bytes > 1_000_000
        server.wait_until_idle()
    assert server.process.returncode == -signal.SIGKILL


def test_stop_returns_the_exit_status(tmp_path: Path) -> None:
    with python(SERVER, tmp_path / "log") as server:
        assert server.stop() == 3


def test_a_server_that_ends_too_early_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"ended with status 4:\nno such setting"):
        python("import sys; print('no such setting', file=sys.stderr); sys.exit(4)", tmp_path / "log").__enter__()


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    server = python("import time; time.sleep(60)", tmp_path / "log")
    with pytest.raises(LaunchError, match=r"was not ready after 0\.5 s"):
        server.__enter__()
    assert server.process.returncode == -signal.SIGKILL


def test_connection_errors_name_the_server_and_its_end(tmp_path: Path) -> None:
    with python(SERVER, tmp_path / "log") as server:
        with pytest.raises(LaunchError, match="does not accept connections"), server.expected_to_listen():
            raise ConnectionRefusedError
        server.stop()
        with pytest.raises(LaunchError, match="ended with status 3"), server.expected_to_listen():
            raise ConnectionRefusedError


def test_the_environment_has_these_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "1")
    found = environment(log_level="debug")
    assert {name: value for name, value in found.items() if name.startswith("DTEM_")} == {"DTEM_LOG_LEVEL": "debug"}
    assert found["PATH"] == os.environ["PATH"]
