"""Drain: the way from the first signal to the end of the process, on which no request that was accepted is lost."""

import asyncio
import contextlib
import ctypes
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.service import Service

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 1.0  # a terminal and the wrapper in it may each deliver one Ctrl-C
HANDSHAKE_SECONDS = 0.1
ACCEPT_SECONDS = 1.0
IDLE_SECONDS = 0.5
LOOK_SECONDS = 0.02
LAST_SECONDS = 1  # of the drain: to answer those who are cut off

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Classic BPF on the TCP header: drop what has SYN and not ACK, which is a wish for a new connection; let the rest pass.
REFUSE_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class EndConnections:
    """Pure ASGI middleware, the outermost: while draining, every answer tells the caller to connect anew."""

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self._app, self._is_draining = app, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_ending(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_draining():
                headers = [header for header in message["headers"] if header[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_ending)


class Server(uvicorn.Server):
    """Uvicorn that answers everything it accepted before it goes.

    At the first SIGTERM or SIGINT readiness turns 503, and every answer ends its connection. Then, within
    `drain_seconds` altogether:

    1. for `drain_grace_seconds` all else goes on, so that balancers can notice and look elsewhere;
    2. new connections are turned away, those already made are accepted, and the port is closed;
    3. connections without a request are closed after half a second in which one may still come, and never while bytes
       of a request are there; requests that have begun, be it by half a head, are read and answered;
    4. those that take too long are cut off with a 503.

    What HTTP/1.1 leaves open: a request sent on an idle connection while the close of it is on its way. It is reset
    before a byte of it was read, and clients may send it again (RFC 9112, 9.3.1). So are requests pipelined behind an
    answer that ends the connection (9.6).

    A second signal, a second or more after the first, ends the process at once with status 1, whatever is inside.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stopped_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._stopped_at >= REPEAT_SECONDS:
            os.write(2, b"a second signal: ended at once\n")  # in a signal handler the locks of logging may be taken
            os._exit(1)
        self._stopped_at = min(self._stopped_at, now)
        self._service.drain()
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # or it would raise them again when all is done, and the exit status were not 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        settings = self._service.settings
        deadline = time.monotonic() + settings.drain_seconds - LAST_SECONDS
        if self._service.is_draining:  # else it could not start, and nobody was told to come
            await asyncio.sleep(settings.drain_grace_seconds)
            await self._stop_listening(sockets or [])
            await self._finish_connections(deadline)
            await self._cut_off()
        await super().shutdown(sockets)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        for listener in sockets:
            refuse_handshakes(listener)
        await asyncio.sleep(HANDSHAKE_SECONDS)  # for those that have begun
        deadline = time.monotonic() + ACCEPT_SECONDS
        while any(map(is_readable, sockets)) and time.monotonic() < deadline:
            await asyncio.sleep(0)  # the event loop accepts
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()

    async def _finish_connections(self, deadline: float) -> None:
        idle_until = min(time.monotonic() + IDLE_SECONDS, deadline)
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < deadline:
            if time.monotonic() >= idle_until:
                self._close_idle()
            await asyncio.sleep(LOOK_SECONDS)

    def _close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            wire = connection.transport.get_extra_info("socket")
            if is_idle(connection) and not is_readable(wire):
                connection.shutdown()

    async def _cut_off(self) -> None:
        """Cancel what is left; the boundary answers for it."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            logger.warning("cut off %d requests: DTEM_DRAIN_SECONDS are over", len(tasks))
            await asyncio.wait(tasks, timeout=LAST_SECONDS / 2)


def refuse_handshakes(listener: socket.socket) -> None:
    """Turn away new connections while those already made can still be accepted.

    To close a port resets what nobody has accepted yet, with the request that may lie in it. Linux alone can do this;
    callers try again after a second, and find the port closed.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in REFUSE_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(REFUSE_SYN), ctypes.addressof(program))
        )


def is_readable(wire: socket.socket) -> bool:
    """Tell whether bytes, a connection or an end wait to be read; not of one that is closed already."""
    if wire.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(wire.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def is_idle(connection: Any) -> bool:
    """Tell whether a connection of uvicorn, of either parser, has neither a request inside nor a part of one."""
    cycle = connection.cycle
    if cycle is not None and not cycle.response_complete:
        return False
    if hasattr(connection, "conn"):  # h11
        return not connection.conn.trailing_data[0]
    begun = (
        connection.scope
    )  # httptools: made at the first byte of a request, and given to the cycle at its last header
    return begun is None or (cycle is not None and cycle.scope is begun)
