"""The proxy's part, around a Ray that is played: replicas that die where they like."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from deploy.ray import body as bodies
from deploy.ray.inlet import BODY, ELAPSED, SERVED_BY
from deploy.ray.proxy import MAX_ATTEMPTS, REPLICA_SAYS_SECONDS, TIMEOUT, Resend

Play = Callable[[Scope, Receive, Send], Any]
START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(SERVED_BY, b"one"), (b"x-request-id", b"x")],
}


async def dies(scope: Scope, receive: Receive, send: Send) -> None:
    """Ray says nothing then."""


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


class Caller:
    """Sends one request through the proxy, and shows what came of it."""

    def __init__(
        self, plays: Sequence[Play], chunks: Sequence[bytes] = (b"image",), leaves: bool = False, **scope: Any
    ) -> None:
        self.scope = {"type": "http", "path": "/classify", "query_string": b"", "headers": [], **scope}
        self._plays = list(plays)
        ends: Message = {"type": "http.disconnect"}
        sent: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        self._messages = [*sent[:-1], ends if leaves else {**sent[-1], "more_body": False}]
        self.seen: list[Scope] = []
        self.answer: list[Message] = []
        asyncio.run(Resend(self._play)(self.scope, self._receive, self._send))

    async def _play(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        await self._plays.pop(0)(scope, receive, send)

    async def _receive(self) -> Message:
        return self._messages.pop(0)

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
def test_a_request_whose_replica_dies_is_sent_again_whole(chunks: Sequence[bytes], deaths: list[Play]) -> None:
    caller = Caller([*deaths, answers], chunks)
    assert (caller.status, caller.body) == (200, b"".join(chunks))
    assert caller.headers[SERVED_BY] == (b"one; attempt=%d" % (len(deaths) + 1) if deaths else b"one")
    assert [message["type"] for message in caller.answer] == ["http.response.start", "http.response.body"]


def test_a_body_that_was_read_in_part_is_sent_again_whole() -> None:
    async def reads_and_dies(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert Caller([reads_and_dies, reads_and_dies, answers], LONG).body == b"".join(LONG)


def test_a_request_that_kills_replicas_is_given_up() -> None:
    caller = Caller([dies] * 10)
    assert len(caller.seen) == MAX_ATTEMPTS
    assert (caller.status, json.loads(caller.body)["code"]) == (503, "not_ready")
    assert caller.headers[b"retry-after"] == b"1"
    assert caller.headers[b"cache-control"] == b"no-store"


def test_a_body_too_long_to_keep_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reads_all_and_dies(scope: Scope, receive: Receive, send: Send) -> None:
        await read(scope, receive)

    monkeypatch.setattr(bodies, "MAX_KEPT_BYTES", len(LONG[0]))
    caller = Caller([reads_all_and_dies, answers], LONG)
    assert (len(caller.seen), caller.status) == (1, 503)
    assert Caller([answers], LONG).body == b"".join(LONG)


def test_nothing_is_sent_for_a_caller_who_left() -> None:
    caller = Caller([answers], (b"im", b"age"), leaves=True)
    assert (caller.seen, caller.answer) == ([], [])


@pytest.mark.parametrize(("query", "status"), [(b"", 503), (b"deadline_ms=100000", 503), (b"deadline_ms=0.001", 504)])
def test_an_answer_of_rays_becomes_one_of_ours(query: bytes, status: int) -> None:
    caller = Caller([dies, times_out], query_string=query)
    assert caller.status == status
    assert json.loads(caller.body)["request_id"].encode() == caller.headers[b"x-request-id"]
    protocol = Caller([times_out], query_string=query, path="/v2/models/tiny/infer")
    assert list(json.loads(protocol.body)) == ["error"]


def test_a_path_that_ray_cannot_route_is_unknown() -> None:
    assert Caller([times_out], path="*").status == 404


def test_what_goes_to_a_replica_is_not_for_callers_to_say() -> None:
    said = [(ELAPSED, b"-5"), (TIMEOUT, b"0"), (b"x-request-disconnect-disabled", b"?1"), (b"x-request-id", b"mine")]
    caller = Caller([dies, answers], headers=[*said, (b"accept", b"*/*")], query_string=b"deadline_ms=5000")
    first, second = (dict(scope["headers"]) for scope in caller.seen)
    assert first.keys() == {ELAPSED, TIMEOUT, b"x-request-id", b"accept"}
    assert first[b"x-request-id"] == caller.headers[b"x-request-id"] == b"mine"
    assert 0 <= float(first[ELAPSED]) <= float(second[ELAPSED]) < 5
    assert 5 < float(second[TIMEOUT]) <= float(first[TIMEOUT]) <= 5 + REPLICA_SAYS_SECONDS


@pytest.mark.parametrize("text", [b"-5", b"0", b"nan", b"inf", b"1e9", b"soon", b""])
def test_a_deadline_that_is_none_is_left_to_the_replica(text: bytes) -> None:
    caller = Caller([answers], query_string=b"deadline_ms=" + text)
    assert TIMEOUT not in dict(caller.seen[0]["headers"])


def test_a_request_is_not_sent_again_when_its_deadline_is_past() -> None:
    caller = Caller([dies, answers], query_string=b"deadline_ms=0.001")
    assert (len(caller.seen), caller.status) == (1, 504)


def test_the_proxys_own_paths_are_rays() -> None:
    async def says(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"success"})

    assert Caller([says], path="/-/healthz").body == b"success"


def test_a_refusal_while_the_body_comes_is_the_end_of_it() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"too large", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    caller = Caller([refuses], LONG)
    assert caller.body == b"too large"
    assert not caller.answer[-1].get("more_body")
