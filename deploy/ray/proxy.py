"""Proxy: what is done in Ray's HTTP proxies, so that a caller meets the service and not what is in front of it.

They get it from their environment (`ray.env`): Ray calls `middlewares` as each of them starts.
"""

import logging
import time
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.boundary import render
from app.api.headers import server_headers, with_headers
from app.errors import DeadlinePassed, NotReady, ServiceError, UnknownPath, echo
from app.observability.logs import name_request
from app.store.selection import MAX_DEADLINE_MS
from deploy.ray.body import Body
from deploy.ray.inlet import BODY, ELAPSED, SERVED_BY

logger = logging.getLogger("ray.serve")  # the proxy's own log

MAX_ATTEMPTS = 3  # a request that kills its replica kills no more than these
RETRY_SECONDS = 1
DRAIN_SECONDS = 3.0
REPLICA_SAYS_SECONDS = 0.1  # a replica's own word on a deadline is better: refused at once with 429, or past with 504
OWN_PATHS = "/-/"  # of Ray's proxies
REQUEST_ID = b"x-request-id"
TIMEOUT = b"x-request-timeout-seconds"  # Ray's
NOT_FROM_CALLERS = {REQUEST_ID, ELAPSED, TIMEOUT, b"x-request-disconnect-disabled"}


def middlewares() -> list[Middleware]:
    return [Middleware(Resend)]


class Resend:
    """Pure ASGI middleware. A request whose replica died before it answered is sent to another one.

    It is safe to: nothing that the service does for a caller changes anything. Of Ray's own answers none reaches a
    caller but those of `/-/…`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["path"].startswith(OWN_PATHS):
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, Body(receive), send)

    async def _answer(self, scope: Scope, body: Body, send: Send) -> None:
        started_at, deadline_seconds, request_id = time.perf_counter(), read_deadline(scope), name_request(scope)
        answer = _Answer(scope, request_id, body, send)
        await body.read_ahead()
        while answer.is_lost and body.can_be_sent and answer.n_attempts < MAX_ATTEMPTS:
            elapsed = time.perf_counter() - started_at
            if answer.n_attempts and deadline_seconds is not None and elapsed >= deadline_seconds:
                break
            if answer.n_attempts:
                logger.warning("request %s lost its replica after %.3f s: sent again", request_id, elapsed)
            answer.n_attempts += 1
            headers = forward_headers(scope, request_id, elapsed, deadline_seconds)
            await self._app({**scope, "headers": headers, BODY: body.whole}, body.replay(), answer.take)
        if answer.is_missing and not body.has_left:
            is_late = deadline_seconds is not None and time.perf_counter() - started_at >= deadline_seconds
            await answer.refuse(explain(scope["path"], is_late))
        elif answer.is_open and not body.has_left:
            await body.swallow(DRAIN_SECONDS)
            await send({"type": "http.response.body", "body": b""})


class _Answer:
    """What a replica says goes to the caller; what Ray says is kept back. Nothing of an answer goes out before its
    body has begun to come, so that a replica can die anywhere before.
    """

    def __init__(self, scope: Scope, request_id: str, body: Body, send: Send) -> None:
        self._scope, self._request_id, self._body, self._send = scope, request_id, body, send
        self._start: Message | None = None
        self.n_attempts = 0
        self.is_missing, self.is_open = True, False
        self._is_rays = False

    @property
    def is_lost(self) -> bool:
        """Whether nobody has said anything to the end, as when a replica dies; Ray's own words are about no replica."""
        return self.is_missing and not self._is_rays

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_rays = all(name != SERVED_BY for name, _ in message["headers"])
            self._start = None if self._is_rays else message
        elif self._start is not None:
            if self.is_missing:
                self.is_missing = False
                await self._send(self._complete(self._start))
            self.is_open = message.get("more_body", False)
            self._body.release()  # of a body that is refused as it comes, no more goes to the replica
            await self._send(message)

    async def refuse(self, error: ServiceError) -> None:
        """Answer in the place of the replicas."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = self._complete(with_headers(message, self._request_id))
            await self._send(message)

        await render(error, self._scope["path"], self._request_id)(self._scope, self._body.replay(), send)

    def _complete(self, start: Message) -> Message:
        """Ray names each request a second time; and what our own server would add is missing."""
        is_tls = self._scope.get("scheme") == "https"
        ours = [(name.lower().encode(), value.encode()) for name, value in server_headers(is_tls=is_tls)]
        again = b"; attempt=%d" % self.n_attempts * (self.n_attempts > 1)
        headers = [(name, value + again * (name == SERVED_BY)) for name, value in start["headers"]]
        kept = [header for header in headers if header[0] != REQUEST_ID]
        return {**start, "headers": [*ours, *kept, (REQUEST_ID, self._request_id.encode())]}


def explain(path: str, is_late: bool) -> ServiceError:
    """Find the words for what no replica has answered."""
    if not path.startswith("/"):  # Ray knows no way for `OPTIONS *`
        return UnknownPath(f"There is nothing at {echo(path)!r}.")
    if is_late:
        return DeadlinePassed("The deadline is past.")
    return NotReady("No replica could answer.", retry_after_seconds=RETRY_SECONDS)


def read_deadline(scope: Scope) -> float | None:
    """Read `deadline_ms`, if it is there and can be one; what is wrong with it, a replica says. Units: seconds."""
    query = parse_qs(scope["query_string"].decode("latin-1"))
    try:
        deadline_ms = float(query["deadline_ms"][0])
    except (KeyError, ValueError):
        return None
    return deadline_ms / 1e3 if 0 < deadline_ms <= MAX_DEADLINE_MS else None


def forward_headers(
    scope: Scope, request_id: str, elapsed: float, deadline_seconds: float | None
) -> list[tuple[bytes, bytes]]:
    """Make the headers that go to a replica. Units: seconds."""
    headers = [(name, value) for name, value in scope["headers"] if name not in NOT_FROM_CALLERS]
    headers += [(REQUEST_ID, request_id.encode()), (ELAPSED, b"%f" % elapsed)]
    if (
        deadline_seconds is not None
    ):  # for those that wait for a replica; one that has them says so itself, a little later
        headers.append((TIMEOUT, b"%f" % (max(0.0, deadline_seconds - elapsed) + REPLICA_SAYS_SECONDS)))
    return headers
