import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from app.store.catalogue import Catalogue
from tests.app.api.test_classify import Gate, gate_all
from tests.app.api.test_shutdown import POST, SECONDS, Running, read_answer, start
from tests.integration.server import wait_until

__all__ = ["start"]
Start = Callable[..., AbstractContextManager[Running]]


def connections(running: Running) -> set[Any]:
    return set(running.server.server_state.connections)


def test_client_that_has_left_is_noticed_while_its_request_runs(start: Start, catalogue: Catalogue) -> None:
    gate = Gate()
    with start(gate_all(catalogue, gate)) as running:
        running.connect(POST).close()
        assert gate.started.wait(SECONDS)
        wait_until(lambda: not connections(running))
        gate.opened.set()


def test_client_that_has_finished_sending_is_answered_however_long_it_takes(start: Start, catalogue: Catalogue) -> None:
    gate = Gate()
    with start(gate_all(catalogue, gate)) as running, running.connect(POST) as connection:
        connection.shutdown(socket.SHUT_WR)
        # An interim response asks whether the client is still there.
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        gate.opened.set()
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK")


def test_peers_are_probed_while_idle(start: Start) -> None:
    with start() as running, running.connect():
        wait_until(lambda: bool(connections(running)))
        (connection,) = connections(running)
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_idle_connection_keeps_no_request(start: Start) -> None:
    """A request refers to the version that answered, which may be dropped meanwhile."""
    with start() as running, running.connect(POST) as connection:
        read_answer(connection)
        (served,) = connections(running)
        wait_until(lambda: served.cycle is None)
