"""Limits: bodies above the cap are refused, by their Content-Length at once and otherwise while they stream; and what
all bodies inside hold together has a cap too, or slow senders of large ones would fill the memory.
"""

import asyncio
import contextlib
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, QueueFull

DRAIN_SECONDS = 3.0


class BodyLimit:
    """Pure ASGI middleware; the application sees BodyTooLarge or QueueFull raised from `receive`, and renders it."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_in_flight_bytes: int, drain_seconds: float = DRAIN_SECONDS
    ) -> None:
        self._app, self._max_body_bytes, self._drain_seconds = app, max_body_bytes, drain_seconds
        self._inside = _Inside(max_in_flight_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _CountedBody(scope, receive, send, self._max_body_bytes, self._inside, self._drain_seconds)
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            body.leave()


@dataclass
class _Inside:
    """The bytes of all bodies that have come and were not answered yet."""

    max_bytes: int
    n_bytes: int = 0


class _CountedBody:
    """One request's body: how much of it came, and whether that was too much."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_bytes: int, inside: _Inside, drain_seconds: float
    ) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._inside, self._drain_seconds = max_bytes, inside, drain_seconds
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")  # the server has refused what is not a number
        self._is_declared_too_large = declared.isdigit() and int(declared[:20]) > max_bytes
        self._n_bytes = self._n_kept = 0
        self._is_complete = False
        self._is_refused = False

    async def receive(self) -> Message:
        """Raises: BodyTooLarge, before the first byte if Content-Length says so; QueueFull."""
        message: Message = {}
        if not self._is_declared_too_large:
            message = await self._receive_counted()
            n_bytes = len(message.get("body", b""))
            self._n_kept += n_bytes
            self._inside.n_bytes += n_bytes
        if self._is_declared_too_large or self._n_bytes > self._max_bytes:
            self._is_refused = True
            raise BodyTooLarge(f"The body has more than {self._max_bytes} bytes.", max_body_bytes=self._max_bytes)
        if self._inside.n_bytes > self._inside.max_bytes:
            self._is_refused = True
            detail = f"The bodies inside hold more than {self._inside.max_bytes} bytes."
            raise QueueFull(detail, retry_after_seconds=1)
        return message

    def leave(self) -> None:
        """Give back the room; what was swallowed after a refusal never took any."""
        self._inside.n_bytes -= self._n_kept

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        self._n_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if not self._is_refused:
            await self._send(message)
        elif message["type"] == "http.response.start":
            headers = [*message["headers"], (b"connection", b"close")]
            await self._send({**message, "headers": headers})
        else:
            await self._send({**message, "more_body": True})
            await self._drain()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        """Swallow what the caller is still sending, for a while: closing at once would reset the connection,
        and many a client would never read the answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                while not self._is_complete:
                    await self._receive_counted()
