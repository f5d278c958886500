import contextlib
import http.client
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.app.odd_images import encode, make_photo
from tests.integration.load import Load
from tests.integration.server import Server, wait_until

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 60
# Requests answered before the signal.
N_BEFORE = 200
HEAD = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()


@pytest.mark.parametrize("is_kept", [True, False])
def test_signal_under_load_loses_no_request(store: Path, tmp_path: Path, is_kept: bool) -> None:
    with Server(store, tmp_path / "log") as server, Load(server.port, PNG, n_clients=16, is_kept=is_kept) as load:
        wait_until(lambda: load.outcomes[200] >= N_BEFORE)
        assert server.stop() == 0
        # Each client stops once it can no longer connect.
        load.join()
    assert set(load.outcomes) == {200}, load.outcomes
    assert "Traceback" not in server.log


def test_grace_period_serves_while_not_ready(store: Path, tmp_path: Path) -> None:
    with (
        Server(store, tmp_path / "log", drain_grace_seconds=2) as server,
        Load(server.port, PNG, n_clients=4, is_kept=True) as load,
    ):
        wait_until(lambda: load.outcomes[200] >= N_BEFORE)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.ask("GET", "/health/ready")[0] == 503)
        assert server.ask("GET", "/health/live")[0] == 200
        before = load.outcomes[200]
        wait_until(lambda: load.outcomes[200] >= before + 10)
        assert server.process.wait(SECONDS) == 0
        load.join()
    assert set(load.outcomes) == {200}, load.outcomes


def begin_request(server: Server) -> socket.socket:
    """Send a request except its end, and return once the server has read it."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    connection.sendall(HEAD + PNG[:10])
    server.ask("GET", "/health/live")
    return connection


def test_simultaneous_signals_count_as_one(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log") as server, begin_request(server) as connection:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            server.process.send_signal(number)
        wait_until(lambda: is_closed(server.port))
        connection.sendall(PNG[10:])
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        assert server.process.wait(SECONDS) == 0


def is_closed(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.1):
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_exits_immediately_with_status_one(store: Path, tmp_path: Path, number: int) -> None:
    with Server(store, tmp_path / "log") as server, begin_request(server):
        started_at = time.monotonic()
        while server.process.poll() is None:
            server.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(0.2)
        assert server.process.returncode == 1
        # The drain would take up to 20 s.
        assert 1 <= time.monotonic() - started_at < 15
        assert "second signal: exiting without draining" in server.log


def test_killed_server_restarts_on_the_same_port(store: Path, tmp_path: Path) -> None:
    left = tmp_path / "tmp"
    left.mkdir()
    before = sorted(path for path in store.rglob("*"))
    with Server(store, tmp_path / "log", tmpdir=left) as server, begin_request(server):
        port = server.port
        with Load(port, PNG, n_clients=4, is_kept=True) as load:
            wait_until(lambda: load.outcomes[200] >= 20)
            server.process.kill()
            server.process.wait(SECONDS)
        with Server(store, tmp_path / "log again", port=port) as again:
            assert again.port == port
            assert again.ask("POST", "/classify", PNG)[0] == 200
            assert again.stop() == 0
    assert list(left.iterdir()) == []
    assert sorted(path for path in store.rglob("*")) == before
