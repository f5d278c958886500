"""Body limit: caps the size of one request body, and of all bodies in flight together.

A body is refused by its Content-Length before it is read, or while it streams. The second cap bounds the memory that
many slow uploads of large bodies can hold.
"""

import asyncio
import contextlib
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, QueueFull

DRAIN_SECONDS = 3.0


class BodyLimit:
    """Pure ASGI middleware. The application sees BodyTooLarge or QueueFull raised from `receive`, and renders it."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_in_flight_bytes: int, drain_seconds: float = DRAIN_SECONDS
    ) -> None:
        self._app, self._max_body_bytes, self._drain_seconds = app, max_body_bytes, drain_seconds
        self._in_flight = _InFlight(max_in_flight_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _CountedBody(scope, receive, send, self._max_body_bytes, self._in_flight, self._drain_seconds)
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            body.release()


@dataclass
class _InFlight:
    """Bytes received for the requests that are not answered yet."""

    max_bytes: int
    n_bytes: int = 0


class _CountedBody:
    """The body of one request, counted as it is received."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_bytes: int, in_flight: _InFlight, drain_seconds: float
    ) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._in_flight, self._drain_seconds = max_bytes, in_flight, drain_seconds
        headers = dict(scope["headers"])
        # The server has refused a length that is not a number.
        declared = headers.get(b"content-length", b"")
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
            self._in_flight.n_bytes += n_bytes
        if self._is_declared_too_large or self._n_bytes > self._max_bytes:
            self._is_refused = True
            raise BodyTooLarge(f"Request body exceeds {self._max_bytes} bytes.", max_body_bytes=self._max_bytes)
        if self._in_flight.n_bytes > self._in_flight.max_bytes:
            self._is_refused = True
            detail = f"Request bodies in flight exceed {self._in_flight.max_bytes} bytes."
            raise QueueFull(detail, retry_after_seconds=1)
        return message

    def release(self) -> None:
        """Subtract this body from the bytes in flight. Bytes discarded after a refusal were never added."""
        self._in_flight.n_bytes -= self._n_kept

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
            await self._discard_rest()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard_rest(self) -> None:
        """Discard what the client still sends, for a limited time.

        Closing at once would reset the connection, and many clients would never read the response.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                while not self._is_complete:
                    await self._receive_counted()
