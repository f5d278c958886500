"""Proxy: middleware in Ray's HTTP proxies, which retries requests and replaces Ray's own answers by the service's.

Ray calls `middlewares` when a proxy starts; `ray.env` names it.
"""

import logging
import time
from functools import cache
from typing import Any
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from app.api.boundary import render
from app.api.headers import server_headers, with_headers
from app.api.http1.connection import Connection
from app.api.http1.connections import Connections
from app.api.http1.timeouts import read_timeouts
from app.errors import DeadlinePassed, NotReady, ServiceError, UnknownPath, echo
from app.observability.logs import name_request
from app.settings import Settings
from app.store.selection import MAX_DEADLINE_MS
from app.system.descriptors import allow_descriptors
from deploy.ray.body import Body
from deploy.ray.middleware import BODY, ELAPSED, SERVED_BY

# The proxy's own log.
logger = logging.getLogger("ray.serve")

# Also the most replicas that a fatal request can kill.
MAX_ATTEMPTS = 3
RETRY_SECONDS = 1
# Leaves a replica time to answer a missed deadline itself, with 429 or 504.
DEADLINE_GRACE_SECONDS = 0.1
# Paths of Ray's proxies.
RAY_PATHS = "/-/"
REQUEST_ID = b"x-request-id"
# Ray's.
TIMEOUT = b"x-request-timeout-seconds"
# Removed from clients' requests.
INTERNAL_HEADERS = {REQUEST_ID, ELAPSED, TIMEOUT, b"x-request-disconnect-disabled"}


def middlewares() -> list[Middleware]:
    # Ray lets uvicorn choose the protocol class.
    HTTP_PROTOCOLS["auto"] = "deploy.ray.proxy:connect"
    return [Middleware(RetryMiddleware)]


@cache
def _connections() -> Connections:
    return Connections(read_timeouts(Settings()), allow_descriptors(Settings().max_connections), _log_refusal)


def connect(**arguments: Any) -> Connection:
    """Make a connection of the service's own server, with its bounds, in a proxy."""
    return _connections()(**arguments)


def _log_refusal(code: str) -> None:
    logger.info("refused a connection: %s", code)


class RetryMiddleware:
    """Pure ASGI middleware: retries a request whose replica died before it answered.

    Retries are safe because requests change nothing. Ray's own answers reach clients only at `/-/…`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["path"].startswith(RAY_PATHS):
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, Body(receive), send)

    async def _answer(self, scope: Scope, body: Body, send: Send) -> None:
        started_at, deadline_seconds, request_id = time.perf_counter(), read_deadline(scope), name_request(scope)
        answer = _Answer(scope, request_id, body, send)
        await body.read_ahead()
        while answer.needs_retry and body.can_be_sent and answer.n_attempts < MAX_ATTEMPTS:
            elapsed = time.perf_counter() - started_at
            if answer.n_attempts and deadline_seconds is not None and elapsed >= deadline_seconds:
                break
            if answer.n_attempts:
                logger.warning(
                    "replica died before it answered, retrying: request %s after %.3f s", request_id, elapsed
                )
            answer.n_attempts += 1
            headers = forward_headers(scope, request_id, elapsed, deadline_seconds)
            await self._app({**scope, "headers": headers, BODY: body.complete}, body.replay(), answer.take)
        if answer.is_missing and body.error is not None:
            await answer.refuse(body.error)
        elif answer.is_missing and not body.is_disconnected:
            is_late = deadline_seconds is not None and time.perf_counter() - started_at >= deadline_seconds
            await answer.refuse(explain(scope["path"], is_late))


class _Answer:
    """Forwards a replica's answer to the client, and holds Ray's own back.

    Nothing is sent before the answer's body starts, so the request can be retried until then.
    """

    def __init__(self, scope: Scope, request_id: str, body: Body, send: Send) -> None:
        self._scope, self._request_id, self._body, self._send = scope, request_id, body, send
        self._start: Message | None = None
        self.n_attempts = 0
        self.is_missing = True
        self._is_rays = False

    @property
    def needs_retry(self) -> bool:
        """Whether the attempt ended without an answer, because its replica died. Ray's own answers are final."""
        return self.is_missing and not self._is_rays

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_rays = all(name != SERVED_BY for name, _ in message["headers"])
            self._start = None if self._is_rays else message
        elif self._start is not None:
            if self.is_missing:
                self.is_missing = False
                await self._send(self._complete(self._start))
            # If the answer refuses a body that is still arriving, the replica gets no more of it.
            self._body.release()
            await self._send(message)

    async def refuse(self, error: ServiceError) -> None:
        """Answer instead of the replicas."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = self._complete(with_headers(message, self._request_id))
            await self._send(message)

        await render(error, self._scope["path"], self._request_id)(self._scope, self._body.replay(), send)

    def _complete(self, start: Message) -> Message:
        """Add the headers of the service's own server and the attempt; drop Ray's second request id."""
        is_tls = self._scope.get("scheme") == "https"
        ours = [(name.lower().encode(), value.encode()) for name, value in server_headers(is_tls=is_tls)]
        attempt = b"; attempt=%d" % self.n_attempts * (self.n_attempts > 1)
        headers = [(name, value + attempt * (name == SERVED_BY)) for name, value in start["headers"]]
        kept = [header for header in headers if header[0] != REQUEST_ID]
        return {**start, "headers": [*ours, *kept, (REQUEST_ID, self._request_id.encode())]}


def explain(path: str, is_late: bool) -> ServiceError:
    """Return the error for a request that no replica answered."""
    # Ray cannot route `OPTIONS *`.
    if not path.startswith("/"):
        return UnknownPath(f"There is nothing at {echo(path)!r}.")
    if is_late:
        return DeadlinePassed("The deadline has passed.")
    return NotReady("No replica could answer.", retry_after_seconds=RETRY_SECONDS)


def read_deadline(scope: Scope) -> float | None:
    """Read a valid `deadline_ms`; a replica reports an invalid one. Units: seconds."""
    query = parse_qs(scope["query_string"].decode("latin-1"))
    try:
        deadline_ms = float(query["deadline_ms"][0])
    except (KeyError, ValueError):
        return None
    return deadline_ms / 1e3 if 0 < deadline_ms <= MAX_DEADLINE_MS else None


def forward_headers(
    scope: Scope, request_id: str, elapsed: float, deadline_seconds: float | None
) -> list[tuple[bytes, bytes]]:
    """Build the headers for a replica. Units: seconds."""
    headers = [(name, value) for name, value in scope["headers"] if name not in INTERNAL_HEADERS]
    headers += [(REQUEST_ID, request_id.encode()), (ELAPSED, b"%f" % elapsed)]
    # Ray's timeout covers the wait for a replica.
    if deadline_seconds is not None:
        headers.append((TIMEOUT, b"%f" % (max(0.0, deadline_seconds - elapsed) + DEADLINE_GRACE_SECONDS)))
    return headers
