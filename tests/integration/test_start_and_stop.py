import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.local.process import environment
from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import BREAKAGES
from tests.app.tiny_store import write_store
from tests.integration.server import ROOT, Server, wait_until

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 60


def run_failing(**settings: object) -> tuple[int, str]:
    """Run a server that must fail to start. Returns its exit status and its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "app"],
        check=False,
        cwd=ROOT,
        env=environment(**settings),
        capture_output=True,
        timeout=SECONDS,
        text=True,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def assert_one_error_line(errors: str, *words: str) -> None:
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("cannot start: ")]
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "name",
    ["missing file", "changed byte", "not JSON", "wrong golden", "missing key", "schema version", "broken graph"],
)
def test_broken_store_stops_the_start_with_file_and_reason(tmp_path: Path, name: str) -> None:
    breakage, file, reason = BREAKAGES[name]
    breakage(write_store(tmp_path))
    status, errors = run_failing(model_store=tmp_path, port=0)
    assert status == 1
    assert_one_error_line(errors, str(tmp_path), file, reason)


def test_missing_store_stops_the_start(tmp_path: Path) -> None:
    status, errors = run_failing(model_store=tmp_path / "nowhere", port=0)
    assert status == 1
    assert_one_error_line(errors, "nowhere", "not a folder")


@pytest.mark.parametrize(
    ("name", "value"), [("port", "99999"), ("device", "tpu"), ("prot", "1"), ("host", "nowhere.invalid")]
)
def test_bad_setting_stops_the_start(store: Path, name: str, value: str) -> None:
    status, errors = run_failing(model_store=store, **{name: value})
    assert status == 1
    assert_one_error_line(errors, f"DTEM_{name.upper()}")


def test_port_in_use_stops_the_start(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, errors = run_failing(model_store=store, port=port)
    assert status == 1
    assert_one_error_line(errors, f"DTEM_PORT={port}", "in use")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_exits_promptly_with_status_zero(store: Path, tmp_path: Path, number: int) -> None:
    with Server(store, tmp_path / "log") as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        idle.request("GET", "/health/live")
        idle.getresponse().read()
        started_at = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - started_at < 5
        assert "Traceback" not in server.log
        idle.close()


def test_signal_lets_the_request_in_flight_finish(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log") as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()
        connection.sendall(head + PNG[:10])
        # Its response shows that the event loop has read the request before it.
        server.ask("GET", "/health/live")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(server.port))
        connection.sendall(PNG[10:])
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        assert server.process.wait(SECONDS) == 0


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def test_announcement_lists_the_addresses(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log") as server:
        address = f"http://127.0.0.1:{server.port}"
        assert f"ready: {address}" in server.announcement
        assert "curl --data-binary @" in server.announcement
        assert f"'{address}/classify?r=8'" in server.announcement
        for path in ("docs", "models", "metrics"):
            assert f"{address}/{path}" in server.announcement
            assert server.ask("GET", f"/{path}")[0] == 200


def test_start_takes_less_than_three_seconds_of_cpu(store: Path, tmp_path: Path) -> None:
    """CPU time, because wall time depends on what else runs on the machine."""
    with Server(store, tmp_path / "log") as server:
        assert server.cpu_seconds < 3


def test_signal_while_loading_exits_with_status_zero(store: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "app"],
        cwd=ROOT,
        env=environment(model_store=store, port=0),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    # Imported just before the store is loaded.
    while b"onnxruntime" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0


def test_torchscript_agrees_with_onnx(store: Path, tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = []
    for engine in ("onnxruntime", "torchscript"):
        with Server(store, tmp_path / engine, engine=engine) as server:
            answers.append(json.loads(server.ask("POST", "/classify?r=16", PNG)[1]))
    for first, second in zip(*(answer["predictions"] for answer in answers), strict=True):
        assert first["label"] == second["label"]
        assert first["probability"] == pytest.approx(second["probability"], abs=1e-5)


def test_service_imports_nothing_of_training() -> None:
    """`python -m app` imports, engine included, only the dependencies of the service."""
    forbidden = {"torch", "timm", "jsonschema", "onnx", "scipy", "sklearn", "matplotlib", "training", "httpx", "ray"}
    program = "import sys, app.__main__, app.backends.onnx; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert {name.split(".")[0] for name in done.stdout.split()} & forbidden == set()
