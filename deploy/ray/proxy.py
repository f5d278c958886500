"""Proxy: what is done in Ray's HTTP proxies, so that a caller meets the service and not what is in front of it.

Ray's proxies get it by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.proxy:middlewares` in the environment of
`ray start`, on every node.
"""

import logging
import time
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.boundary import render
from app.api.headers import server_headers, with_headers
from app.errors import DeadlinePassed, NotReady, ServiceError, UnknownPath, echo
from app.logs import name_request
from deploy.ray.inlet import ELAPSED, SERVED_BY

logger = logging.getLogger("ray.serve")  # the proxy's own log

MAX_ATTEMPTS = 3  # a request that kills its replica kills no more than these
MAX_KEPT_BYTES = 100_000_000  # a longer body is not kept, and its request not sent again
RETRY_SECONDS = 1
OWN_PATHS = "/-/"  # of Ray's proxies
REQUEST_ID = b"x-request-id"
TIMEOUT = b"x-request-timeout-seconds"  # Ray's
NOT_FROM_CALLERS = {REQUEST_ID, ELAPSED, TIMEOUT, b"x-request-disconnect-disabled"}


def middlewares() -> list[Middleware]:
    return [Middleware(Resend)]


class Resend:
    """Pure ASGI middleware. A request whose replica died before it answered is sent to another one.

    It is safe to: nothing that the service does changes anything. Of Ray's own answers none reaches a caller but those
    of `/-/…`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["path"].startswith(OWN_PATHS):
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at, deadline_seconds, request_id = time.perf_counter(), read_deadline(scope), name_request(scope)
        body = _Body(receive)
        answer = _Answer(scope, request_id, body, send)
        while answer.is_missing and not body.has_left and body.is_kept and answer.n_attempts < MAX_ATTEMPTS:
            elapsed = time.perf_counter() - started_at
            if answer.n_attempts:
                logger.warning("request %s lost its replica after %.3f s: sent again", request_id, elapsed)
            answer.n_attempts += 1
            forwarded = {**scope, "headers": forward_headers(scope, request_id, elapsed, deadline_seconds)}
            await self._app(forwarded, body.replay(), answer.take)
        if answer.is_missing and not body.has_left:
            is_late = deadline_seconds is not None and time.perf_counter() - started_at >= deadline_seconds
            await answer.refuse(explain(scope["path"], is_late))


class _Body:
    """A request's body as it comes, kept until the answer begins."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._n_bytes = 0
        self.is_kept = True
        self.has_left = False

    def replay(self) -> Receive:
        """Make a `receive` that begins with what has come already."""
        n_read = 0

        async def receive() -> Message:
            nonlocal n_read
            n_read += 1
            if n_read <= len(self._kept):
                return self._kept[n_read - 1]
            message = await self._receive()
            self._note(message)
            return message

        return receive

    def _note(self, message: Message) -> None:
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > MAX_KEPT_BYTES:
            self.drop()
        if self.is_kept:
            self._kept.append(message)

    def drop(self) -> None:
        self.is_kept = False
        self._kept.clear()


class _Answer:
    """What a replica says goes to the caller; what Ray says is kept back. Nothing of an answer goes out before its
    body has begun to come, so that a replica can die anywhere before.
    """

    def __init__(self, scope: Scope, request_id: str, body: _Body, send: Send) -> None:
        self._scope, self._request_id, self._body, self._send = scope, request_id, body, send
        self._fixed = [(name.lower().encode(), value.encode()) for name, value in _fixed_headers(scope)]
        self._start: Message | None = None
        self.is_missing = True
        self.n_attempts = 0

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_replicas = any(name == SERVED_BY for name, _ in message["headers"])
            self._start = message if is_replicas else None
        elif self._start is not None:
            if self.is_missing:
                self.is_missing = False
                self._body.drop()
                await self._send(self._complete(self._start))
            await self._send(message)

    async def refuse(self, error: ServiceError) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = self._complete(with_headers(message, self._request_id))
            await self._send(message)

        await render(error, self._scope["path"], self._request_id)(self._scope, self._body.replay(), send)

    def _complete(self, start: Message) -> Message:
        """Ray names each request a second time; and what our own server would add is missing."""
        again = b"; attempt=%d" % self.n_attempts * (self.n_attempts > 1)
        headers = [
            (name, value + again if name == SERVED_BY else value)
            for name, value in start["headers"]
            if name != REQUEST_ID
        ]
        return {**start, "headers": [*self._fixed, *headers, (REQUEST_ID, self._request_id.encode())]}


def explain(path: str, is_late: bool) -> ServiceError:
    """Find the words for what Ray has no answer of a replica's to."""
    if not path.startswith("/"):  # Ray knows no way for `OPTIONS *`
        return UnknownPath(f"There is nothing at {echo(path)!r}.")
    if is_late:
        return DeadlinePassed("The deadline is past.")
    return NotReady("No replica could answer.", retry_after_seconds=RETRY_SECONDS)


def _fixed_headers(scope: Scope) -> list[tuple[str, str]]:
    return server_headers(is_tls=scope.get("scheme") == "https")


def read_deadline(scope: Scope) -> float | None:
    """Read `deadline_ms`, if it is there and a number; what is wrong with it, a replica says. Units: seconds."""
    query = parse_qs(scope["query_string"].decode("latin-1"))
    try:
        return float(query["deadline_ms"][0]) / 1e3
    except (KeyError, ValueError):
        return None


def forward_headers(
    scope: Scope, request_id: str, elapsed: float, deadline_seconds: float | None
) -> list[tuple[bytes, bytes]]:
    """Make the headers that go to a replica. Units: seconds."""
    headers = [(name, value) for name, value in scope["headers"] if name not in NOT_FROM_CALLERS]
    headers += [(REQUEST_ID, request_id.encode()), (ELAPSED, b"%f" % elapsed)]
    if deadline_seconds is not None:  # for those that wait for a replica; one that has them says so itself
        headers.append((TIMEOUT, b"%f" % max(0.001, deadline_seconds - elapsed)))
    return headers
