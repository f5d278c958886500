import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop
from prometheus_client import CollectorRegistry

from app.__main__ import configure, listen
from app.api.shutdown import Server, is_readable, refuse_handshakes
from app.observability.metrics import Metrics
from app.serving.service import Service
from app.settings import Settings
from app.store.catalogue import Catalogue
from tests.app.api.test_classify import Gate, gate_all
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(8, 8), "PNG")
POST = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(PNG), PNG)
SECONDS = 30
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Running:
    """The server in a thread, with one of the event loops."""

    def __init__(self, loop: str, catalogue: Catalogue, **settings: object) -> None:
        given = Settings.model_validate({"port": 0, **settings})
        self.service = Service(given, Metrics(CollectorRegistry()))
        self.service.publish(catalogue)
        self.server = Server(configure(given, self.service, None), self.service)
        self.listener = listen(given.host, given.port)
        self.port: int = self.listener.getsockname()[1]
        self.loop = LOOPS[loop]()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.loop.run_until_complete(self.server.serve(sockets=[self.listener]))
        self.loop.close()

    def stop(self) -> None:
        """Simulate a signal. A real one would reach the main thread, which runs pytest."""
        self.loop.call_soon_threadsafe(self.server.handle_exit, signal.SIGTERM, None)

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        connection.sendall(data)
        return connection

    def ask(self, data: bytes) -> bytes:
        with self.connect(data) as connection:
            return read_answer(connection)

    def wait_until_seen(self) -> None:
        """Wait until the event loop has read everything sent so far."""
        assert b" 200 OK" in self.ask(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    def wait_until_closed(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.listener.fileno() >= 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def read_answer(connection: socket.socket) -> bytes:
    """Read until the server closes the connection, or until the body is complete if it is kept alive."""
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        if lengths and len(body) >= int(lengths[0]) and b"connection: close" not in head.lower():
            break
    return answer


@pytest.fixture(params=["asyncio", "uvloop"])
def start(request: pytest.FixtureRequest, catalogue: Catalogue) -> Any:
    @contextmanager
    def start(served: Catalogue = catalogue, **settings: object) -> Iterator[Running]:
        running = Running(request.param, served, **settings)
        running.thread.start()
        try:
            yield running
        finally:
            if not running.service.is_draining:
                running.stop()
            running.thread.join(SECONDS)
            assert not running.thread.is_alive()

    return start


def test_idle_connections_are_closed_after_a_last_chance_to_send(start: Any) -> None:
    with start() as running:
        used, fresh, late = running.connect(POST), running.connect(), running.connect()
        assert b" 200 OK" in read_answer(used)
        running.wait_until_seen()
        running.stop()
        running.wait_until_closed()
        late.sendall(POST)
        answer = read_answer(late)
        assert b" 200 OK" in answer
        assert b"connection: close" in answer.lower()
        for connection in (used, fresh):
            # The connection ends without a reset.
            assert connection.recv(1) == b""
        for connection in (used, fresh, late):
            connection.close()


@pytest.mark.parametrize("n_bytes", [1, 40, len(POST) - 10])
def test_request_that_has_begun_is_answered(start: Any, n_bytes: int) -> None:
    with start() as running, running.connect(POST) as connection, running.connect() as idle:
        # The second request on this connection is the one under test.
        assert b" 200 OK" in read_answer(connection)
        connection.sendall(POST[:n_bytes])
        running.wait_until_seen()
        running.stop()
        # Idle connections are closed by now.
        assert idle.recv(1) == b""
        connection.sendall(POST[n_bytes:])
        answer = read_answer(connection)
        assert b" 200 OK" in answer
        assert b"connection: close" in answer.lower()


def test_requests_in_flight_are_answered(start: Any, catalogue: Catalogue) -> None:
    gate = Gate()
    with start(gate_all(catalogue, gate)) as running:
        connections = [running.connect(POST) for _ in range(4)]
        assert gate.started.wait(SECONDS)
        running.stop()
        running.wait_until_closed()
        gate.opened.set()
        for connection in connections:
            assert b" 200 OK" in read_answer(connection)
            connection.close()


def test_grace_period_keeps_the_port_open_while_not_ready(start: Any) -> None:
    with start(drain_grace_seconds=2.0) as running:
        running.wait_until_seen()
        running.stop()
        while not running.service.is_draining:
            time.sleep(0.001)
        refusal = running.ask(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 503 " in refusal
        assert b"shutting_down" in refusal
        assert b" 200 OK" in running.ask(POST)
        running.wait_until_closed()


def test_request_that_outlasts_the_drain_is_aborted_with_503(start: Any, catalogue: Catalogue) -> None:
    gate = Gate()
    with (
        start(gate_all(catalogue, gate), drain_seconds=2) as running,
        running.connect(POST) as hung,
        running.connect(POST[:-10]) as half,
    ):
        assert gate.started.wait(SECONDS)
        started_at = time.monotonic()
        running.stop()
        for connection in (hung, half):
            answer = read_answer(connection)
            assert b" 503 " in answer
            assert b"shutting_down" in answer
        # A generous limit, for a busy machine.
        assert time.monotonic() - started_at < 2 + SECONDS / 2
        gate.opened.set()


def test_refuse_handshakes_keeps_established_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert not is_readable(listener)
        with socket.create_connection(address) as before:
            before.sendall(b"hello")
            refuse_handshakes(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            assert is_readable(listener)
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"
                accepted.sendall(b"world")
                assert before.recv(5) == b"world"
    assert not is_readable(listener)
