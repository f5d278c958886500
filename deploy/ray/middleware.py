"""Middleware: adapts requests from Ray's proxies to the application in a replica."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.boundary import STARTED_AT
from deploy.ray.body import DISCONNECT

logger = logging.getLogger(__name__)

SERVED_BY = b"x-served-by"
# Seconds since the request reached the proxy. The proxy removes it from clients' requests.
ELAPSED = b"x-dtem-elapsed-seconds"
# Scope key: the complete body, if the proxy sent it with the request.
BODY = "dtem.body"


class ReplicaMiddleware:
    """Pure ASGI middleware: the application sees requests as its own server would pass them."""

    def __init__(self, app: ASGIApp, name: str, gather_metrics: Callable[[], Awaitable[bytes]]) -> None:
        self._app, self._name, self._gather_metrics = app, name.encode(), gather_metrics
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._warn_if_unprotected(scope)
        scope[STARTED_AT] = time.perf_counter() - elapsed_seconds(scope)
        send = self._with_replica_name(send)
        if scope["path"] == "/metrics":
            send = self._with_all_metrics(send)
        await self._serve(scope, _Receive(receive, scope.pop(BODY, None)), send)

    def _warn_if_unprotected(self, scope: Scope) -> None:
        if BODY not in scope and not self._has_warned:
            logger.warning(
                "requests bypass deploy.ray.proxy and are not retried: set the variables of deploy/ray/ray.env"
            )
            self._has_warned = True

    async def _serve(self, scope: Scope, receive: "_Receive", send: Send) -> None:
        """Turn Ray's cancellation, which could interrupt the application anywhere, into a disconnect message."""
        answering = asyncio.ensure_future(self._app(scope, receive, send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            receive.disconnect()
            await answering
            raise

    def _with_replica_name(self, send: Send) -> Send:
        async def send_with_replica_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (SERVED_BY, self._name)]}
            await send(message)

        return send_with_replica_name

    def _with_all_metrics(self, send: Send) -> Send:
        """Replace the metrics of this replica by those of all, if the application has authorised the request."""
        start: Message = {}

        async def send_with_all_metrics(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start["status"] == 200:
                message = {**message, "body": await self._gather_metrics()}
            headers = [header for header in start["headers"] if header[0] != b"content-length"]
            length = (b"content-length", b"%d" % len(message["body"]))
            await send({**start, "headers": [*headers, length]})
            await send(message)

        return send_with_all_metrics


class _Receive:
    """A `receive` that can report a disconnect at any time."""

    def __init__(self, receive: Receive, body: bytes | None) -> None:
        self._receive, self._body = receive, body
        self._waiting: asyncio.Future[Message] | None = None
        self._is_disconnected = False

    async def __call__(self) -> Message:
        if self._is_disconnected:
            return DISCONNECT
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._waiting = asyncio.ensure_future(self._receive())
        try:
            return await self._waiting
        except asyncio.CancelledError:
            if self._is_disconnected:
                return DISCONNECT
            raise
        # The proxy died, or dropped the request.
        except RayError:
            self._is_disconnected = True
            return DISCONNECT

    def disconnect(self) -> None:
        self._is_disconnected = True
        if self._waiting is not None:
            self._waiting.cancel()


def elapsed_seconds(scope: Scope) -> float:
    """Return the time since the request reached the proxy; 0 without a valid header."""
    header = next((value for name, value in scope["headers"] if name == ELAPSED), b"0")
    try:
        return max(0.0, float(header))
    except ValueError:
        return 0.0
