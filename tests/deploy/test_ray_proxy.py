"""The proxy's middleware around a fake Ray, whose replicas die at any point."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.errors import RequestTimeout, ServiceError
from deploy.ray import body as bodies
from deploy.ray.middleware import BODY, ELAPSED, SERVED_BY
from deploy.ray.proxy import DEADLINE_GRACE_SECONDS, MAX_ATTEMPTS, TIMEOUT, RetryMiddleware

Replica = Callable[[Scope, Receive, Send], Any]
START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(SERVED_BY, b"one"), (b"x-request-id", b"x")],
}


async def dies(scope: Scope, receive: Receive, send: Send) -> None:
    """Ray then sends nothing."""


async def dies_in_its_answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": await read(scope, receive)})


async def times_out(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 408, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"Request timed out"})


async def read(scope: Scope, receive: Receive) -> bytes:
    if scope[BODY] is not None:
        return bytes(scope[BODY])
    parts = [message := await receive()]
    while message.get("more_body"):
        parts.append(message := await receive())
    return b"".join(part["body"] for part in parts)


class Exchange:
    """One request through the proxy: what its replicas got, and what the client got."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        chunks: Sequence[bytes] = (b"image",),
        disconnects: bool = False,
        fails: ServiceError | None = None,
        **scope: Any,
    ) -> None:
        self.scope = {"type": "http", "path": "/classify", "query_string": b"", "headers": [], **scope}
        self._replicas = list(replicas)
        ends: Message = {"type": "http.disconnect"}
        sent: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        end = ends if disconnects else {**sent[-1], "more_body": False}
        self._messages: list[Message | ServiceError] = [*sent[:-1], fails or end]
        self.seen: list[Scope] = []
        self.answer: list[Message] = []
        asyncio.run(RetryMiddleware(self._attempt)(self.scope, self._receive, self._send))

    async def _attempt(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        await self._replicas.pop(0)(scope, receive, send)

    async def _receive(self) -> Message:
        message = self._messages.pop(0)
        if isinstance(message, ServiceError):
            raise message
        return message

    async def _send(self, message: Message) -> None:
        self.answer.append(message)

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        assert len(dict(self.answer[0]["headers"])) == len(self.answer[0]["headers"])
        return dict(self.answer[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.answer[1:])


LONG = (b"long" * bodies.MAX_AHEAD_BYTES, b"and", b"more")


@pytest.mark.parametrize("chunks", [(b"image",), (b"im", b"age"), LONG])
@pytest.mark.parametrize("deaths", [[], [dies], [dies_in_its_answer], [dies, dies_in_its_answer]])
def test_request_is_retried_with_its_complete_body(chunks: Sequence[bytes], deaths: list[Replica]) -> None:
    exchange = Exchange([*deaths, answers], chunks)
    assert (exchange.status, exchange.body) == (200, b"".join(chunks))
    assert exchange.headers[SERVED_BY] == (b"one; attempt=%d" % (len(deaths) + 1) if deaths else b"one")
    assert [message["type"] for message in exchange.answer] == ["http.response.start", "http.response.body"]


def test_partly_read_body_is_resent_from_its_start() -> None:
    async def reads_and_dies(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert Exchange([reads_and_dies, reads_and_dies, answers], LONG).body == b"".join(LONG)


def test_request_that_kills_replicas_is_refused_after_the_last_attempt() -> None:
    exchange = Exchange([dies] * 10)
    assert len(exchange.seen) == MAX_ATTEMPTS
    assert (exchange.status, json.loads(exchange.body)["code"]) == (503, "not_ready")
    assert exchange.headers[b"retry-after"] == b"1"
    assert exchange.headers[b"cache-control"] == b"no-store"


def test_request_with_a_body_too_long_to_keep_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reads_all_and_dies(scope: Scope, receive: Receive, send: Send) -> None:
        await read(scope, receive)

    monkeypatch.setattr(bodies, "MAX_KEPT_BYTES", len(LONG[0]))
    exchange = Exchange([reads_all_and_dies, answers], LONG)
    assert (len(exchange.seen), exchange.status) == (1, 503)
    assert Exchange([answers], LONG).body == b"".join(LONG)


def test_disconnected_client_causes_no_attempt() -> None:
    exchange = Exchange([answers], (b"im", b"age"), disconnects=True)
    assert (exchange.seen, exchange.answer) == ([], [])


@pytest.mark.parametrize(("query", "status"), [(b"", 503), (b"deadline_ms=100000", 503), (b"deadline_ms=0.001", 504)])
def test_rays_answer_is_replaced_by_the_services(query: bytes, status: int) -> None:
    exchange = Exchange([dies, times_out], query_string=query)
    assert exchange.status == status
    assert json.loads(exchange.body)["request_id"].encode() == exchange.headers[b"x-request-id"]
    protocol = Exchange([times_out], query_string=query, path="/v2/models/tiny/infer")
    assert list(json.loads(protocol.body)) == ["error"]


def test_path_that_ray_cannot_route_is_unknown() -> None:
    assert Exchange([times_out], path="*").status == 404


def test_clients_cannot_set_internal_headers() -> None:
    forged = [(ELAPSED, b"-5"), (TIMEOUT, b"0"), (b"x-request-disconnect-disabled", b"?1"), (b"x-request-id", b"mine")]
    exchange = Exchange([dies, answers], headers=[*forged, (b"accept", b"*/*")], query_string=b"deadline_ms=5000")
    first, second = (dict(scope["headers"]) for scope in exchange.seen)
    assert first.keys() == {ELAPSED, TIMEOUT, b"x-request-id", b"accept"}
    assert first[b"x-request-id"] == exchange.headers[b"x-request-id"] == b"mine"
    assert 0 <= float(first[ELAPSED]) <= float(second[ELAPSED]) < 5
    assert 5 < float(second[TIMEOUT]) <= float(first[TIMEOUT]) <= 5 + DEADLINE_GRACE_SECONDS


@pytest.mark.parametrize("text", [b"-5", b"0", b"nan", b"inf", b"1e9", b"soon", b""])
def test_invalid_deadline_is_left_to_the_replica(text: bytes) -> None:
    exchange = Exchange([answers], query_string=b"deadline_ms=" + text)
    assert TIMEOUT not in dict(exchange.seen[0]["headers"])


def test_request_is_not_retried_after_its_deadline() -> None:
    exchange = Exchange([dies, answers], query_string=b"deadline_ms=0.001")
    assert (len(exchange.seen), exchange.status) == (1, 504)


def test_rays_own_paths_are_passed_on() -> None:
    async def reports(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"success"})

    assert Exchange([reports], path="/-/healthz").body == b"success"


def test_refusal_while_the_body_arrives_ends_the_body() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"too large"})
        assert (await receive())["type"] == "http.disconnect"

    assert Exchange([refuses], LONG).body == b"too large"


def test_body_that_fails_in_the_proxy_is_answered_there() -> None:
    async def waits_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    # Before the request is sent to a replica, and while a long body is.
    for replicas, chunks in (([], (b"image", b"")), ([waits_for_the_end], (*LONG, b""))):
        exchange = Exchange(replicas, chunks, fails=RequestTimeout("too slow"))
        assert (exchange.status, json.loads(exchange.body)["code"]) == (408, "request_timeout")
