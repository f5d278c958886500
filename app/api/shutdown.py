"""Shutdown: drains the server between the first signal and the end of the process. No accepted request is lost."""

import asyncio
import contextlib
import ctypes
import logging
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http1.connection import Connection
from app.serving.service import Service

logger = logging.getLogger(__name__)

# One Ctrl-C may arrive twice: from the terminal, and from a wrapper process in it.
REPEAT_SECONDS = 1.0
HANDSHAKE_SECONDS = 0.1
ACCEPT_SECONDS = 1.0
IDLE_SECONDS = 0.5
POLL_SECONDS = 0.02
# Reserved at the end of the drain, to answer the requests that are aborted.
ABORT_SECONDS = 1

# From asm-generic/socket.h.
SO_ATTACH_FILTER = 26
# Classic BPF on the TCP header: drop packets with SYN and without ACK, which open a connection; pass all others.
REFUSE_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class CloseConnections:
    """Pure ASGI middleware, the outermost. While draining, every response has `Connection: close`."""

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self._app, self._is_draining = app, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_draining():
                headers = [header for header in message["headers"] if header[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_closing)


class Server(uvicorn.Server):
    """Uvicorn that answers every accepted request before it exits.

    At the first SIGTERM or SIGINT readiness turns 503, and every response closes its connection. Then, within
    `drain_seconds` in total:

    1. For `drain_grace_seconds` everything else continues, so that load balancers can notice.
    2. New connections are refused, established ones are accepted, and the port is closed.
    3. Idle connections are closed after half a second in which a request may still arrive, and never while bytes of a
       request are unread. Requests that have begun, even with half a head, are read and answered.
    4. Requests that take too long are aborted with a 503.

    HTTP/1.1 leaves two gaps. A request sent on an idle connection just as it is closed is reset before any byte of it
    is read; clients may retry it (RFC 9112, 9.3.1). So are requests pipelined behind a response that closes the
    connection (9.6).

    A second signal, at least a second after the first, ends the process at once with status 1.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stopped_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._stopped_at >= REPEAT_SECONDS:
            # Not logged: the interrupted code may hold a lock of logging.
            os.write(sys.stderr.fileno(), b"second signal: exiting without draining\n")
            os._exit(1)
        self._stopped_at = min(self._stopped_at, now)
        self._service.drain()
        super().handle_exit(sig, frame)
        # Otherwise uvicorn raises the signals again at the end, and the exit status is not 0.
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        settings = self._service.settings
        deadline = time.monotonic() + settings.drain_seconds - ABORT_SECONDS
        # Not draining if the start failed: then there is nothing to wait for.
        if self._service.is_draining:
            await asyncio.sleep(settings.drain_grace_seconds)
            await self._stop_listening(sockets or [])
            await self._finish_connections(deadline)
            await self._abort_requests()
        await super().shutdown(sockets)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        for listener in sockets:
            refuse_handshakes(listener)
        # Let handshakes that have begun complete.
        await asyncio.sleep(HANDSHAKE_SECONDS)
        deadline = time.monotonic() + ACCEPT_SECONDS
        while any(map(is_readable, sockets)) and time.monotonic() < deadline:
            # Let the event loop accept.
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()

    async def _finish_connections(self, deadline: float) -> None:
        idle_until = min(time.monotonic() + IDLE_SECONDS, deadline)
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < deadline:
            if time.monotonic() >= idle_until:
                self._close_idle()
            await asyncio.sleep(POLL_SECONDS)

    def _close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            sock = connection.transport.get_extra_info("socket")
            if cast(Connection, connection).is_idle and not is_readable(sock):
                connection.shutdown()

    async def _abort_requests(self) -> None:
        """Cancel the remaining requests. The boundary answers them."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            logger.warning("aborted requests still in flight after DTEM_DRAIN_SECONDS: %d", len(tasks))
            await asyncio.wait(tasks, timeout=ABORT_SECONDS / 2)


def refuse_handshakes(listener: socket.socket) -> None:
    """Refuse new connections, while established ones can still be accepted. Linux only.

    Closing the port would reset the connections not yet accepted, with any request they carry. Clients that are refused
    here try again after a second, and find the port closed.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in REFUSE_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(REFUSE_SYN), ctypes.addressof(program))
        )


def is_readable(sock: socket.socket) -> bool:
    """Return whether bytes, a connection or an end of stream can be read. False for a closed socket."""
    if sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))
