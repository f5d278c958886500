"""Limits: bodies above the cap are refused, by their Content-Length at once and otherwise while they stream."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge

DRAIN_SECONDS = 3.0


class BodyLimit:
    """Pure ASGI middleware; the application sees BodyTooLarge raised from `receive`, and renders it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, drain_seconds: float = DRAIN_SECONDS) -> None:
        self._app, self._max_body_bytes, self._drain_seconds = app, max_body_bytes, drain_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _CountedBody(scope, receive, send, self._max_body_bytes, self._drain_seconds)
        await self._app(scope, body.receive, body.send)


class _CountedBody:
    """One request's body: how much of it came, and whether that was too much."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int, drain_seconds: float) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._drain_seconds = max_bytes, drain_seconds
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")  # the server has refused what is not a number
        self._is_declared_too_large = declared.isdigit() and int(declared[:20]) > max_bytes
        self._n_bytes = 0
        self._is_complete = False
        self._is_refused = False

    async def receive(self) -> Message:
        """Raises: BodyTooLarge, before the first byte if Content-Length says so."""
        if self._is_declared_too_large:
            raise self._refuse()
        message = await self._receive_counted()
        if self._n_bytes > self._max_bytes:
            raise self._refuse()
        return message

    def _refuse(self) -> BodyTooLarge:
        self._is_refused = True
        return BodyTooLarge(f"The body has more than {self._max_bytes} bytes.", max_body_bytes=self._max_bytes)

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
