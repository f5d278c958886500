"""Inlet: where requests from Ray's proxies come into the application of a replica."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.boundary import STARTED_AT
from deploy.ray.body import GONE

logger = logging.getLogger(__name__)

SERVED_BY = b"x-served-by"
ELAPSED = b"x-dtem-elapsed-seconds"  # since the request came to the proxy; the proxy lets no caller say it
BODY = "dtem.body"  # key in the scope: the whole body, where it has travelled with the request


class Inlet:
    """Pure ASGI middleware: what reaches the application is as if its own server had brought it."""

    def __init__(self, app: ASGIApp, name: str, gather_metrics: Callable[[], Awaitable[bytes]]) -> None:
        self._app, self._name, self._gather_metrics = app, name.encode(), gather_metrics
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._warn_if_unprotected(scope)
        scope[STARTED_AT] = time.perf_counter() - elapsed_seconds(scope)
        send = self._signed(send)
        if scope["path"] == "/metrics":
            send = self._completed(send)
        await self._serve(scope, _Leaving(receive, scope.pop(BODY, None)), send)

    def _warn_if_unprotected(self, scope: Scope) -> None:
        if BODY not in scope and not self._has_warned:
            logger.warning("requests come past deploy.ray.proxy, and die with their replica: see deploy/ray/ray.env")
            self._has_warned = True

    async def _serve(self, scope: Scope, receive: "_Leaving", send: Send) -> None:
        """Tell the application that its caller left, where Ray would cancel it in the middle of anything."""
        answering = asyncio.ensure_future(self._app(scope, receive, send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            receive.leave()
            await answering
            raise

    def _signed(self, send: Send) -> Send:
        async def send_signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (SERVED_BY, self._name)]}
            await send(message)

        return send_signed

    def _completed(self, send: Send) -> Send:
        """Put the metrics of all replicas in the place of ours, once the application has decided to show them."""
        start: Message = {}

        async def send_completed(message: Message) -> None:
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

        return send_completed


class _Leaving:
    """A `receive` that can be told that the caller has left."""

    def __init__(self, receive: Receive, body: bytes | None) -> None:
        self._receive, self._body = receive, body
        self._waiting: asyncio.Future[Message] | None = None
        self._has_left = False

    async def __call__(self) -> Message:
        if self._has_left:
            return GONE
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._waiting = asyncio.ensure_future(self._receive())
        try:
            return await self._waiting
        except asyncio.CancelledError:
            if self._has_left:
                return GONE
            raise
        except RayError:  # the proxy is gone, or has let go of the request
            self._has_left = True
            return GONE

    def leave(self) -> None:
        self._has_left = True
        if self._waiting is not None:
            self._waiting.cancel()


def elapsed_seconds(scope: Scope) -> float:
    """Read how long the request has been under way before it came here; 0 if nobody says it."""
    said = next((value for name, value in scope["headers"] if name == ELAPSED), b"0")
    try:
        return max(0.0, float(said))
    except ValueError:
        return 0.0
