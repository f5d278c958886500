import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api.body_limit import BodyLimit
from app.api.problems import problem_response
from app.errors import QueueFull, ServiceError


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, and render errors as the boundary does."""
    try:
        while (await receive()).get("more_body", False):
            pass
    except ServiceError as error:
        await problem_response(error)(scope, receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class FakeConnection:
    """Stands in for the server: sends a request body, and collects the response."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)
        self.n_received = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if not self.chunks:
            await asyncio.Event().wait()
        self.n_received += 1
        chunk = self.chunks.pop(0)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks)}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def run(self, max_body_bytes: int, **headers: str) -> int:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope: dict[str, Any] = {"type": "http", "headers": raw}
        limit = BodyLimit(read_all, max_body_bytes, 100)
        asyncio.run(limit(scope, self.receive, self.send))
        status: int = self.sent[0]["status"]
        return status


def test_limit_accepts_a_body_within_it() -> None:
    connection = FakeConnection(b"12345", b"67890")
    assert connection.run(10, content_length="10") == 200
    assert connection.sent[-1].get("more_body", False) is False


def test_limit_refuses_a_large_content_length_before_reading() -> None:
    connection = FakeConnection(b"12345", b"678901")
    assert connection.run(10, content_length="11") == 413
    assert (b"connection", b"close") in connection.sent[0]["headers"]
    assert connection.n_received == 0


def test_limit_counts_chunks_without_content_length() -> None:
    connection = FakeConnection(b"12345", b"678901", b"more")
    assert connection.run(10) == 413
    assert connection.n_received == 2


def test_limit_counts_chunks_if_content_length_is_too_small() -> None:
    assert FakeConnection(b"12345", b"678901").run(10, content_length="5") == 413


@pytest.mark.parametrize("length", ["", "x", "-1", "1e9"])
def test_limit_counts_chunks_if_content_length_is_invalid(length: str) -> None:
    assert FakeConnection(b"12345").run(10, content_length=length) == 200
    assert FakeConnection(b"x" * 11).run(10, content_length=length) == 413


def test_limit_passes_other_scopes_through() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    connection = FakeConnection()
    asyncio.run(BodyLimit(app, 10, max_in_flight_bytes=100)({"type": "lifespan"}, connection.receive, connection.send))
    assert seen == ["lifespan"]


def test_limit_bounds_all_bodies_in_flight_and_releases_them() -> None:
    statuses: list[int] = []
    is_held, release = asyncio.Event(), asyncio.Event()

    async def hold(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except QueueFull as error:
            statuses.append(429)
            await problem_response(error)(scope, receive, send)
            return
        statuses.append(200)
        is_held.set()
        await release.wait()

    async def scenario() -> None:
        limit = BodyLimit(hold, max_body_bytes=10, max_in_flight_bytes=15)
        scope: dict[str, Any] = {"type": "http", "headers": []}
        connection = FakeConnection(b"1234567890")
        first = asyncio.ensure_future(limit(scope, connection.receive, connection.send))
        await is_held.wait()
        await limit(scope, (second := FakeConnection(b"123456")).receive, second.send)
        assert second.sent[0]["status"] == 429
        assert (b"connection", b"close") in second.sent[0]["headers"]
        release.set()
        await first
        await limit(scope, (third := FakeConnection(b"123456")).receive, third.send)

    asyncio.run(scenario())
    assert statuses == [200, 429, 200]


class Stalled(FakeConnection):
    """Sends its chunks but never the end of the body."""

    async def receive(self) -> Message:
        return {**await super().receive(), "more_body": True}


def test_full_limit_evicts_stalled_uploads_for_a_new_one() -> None:
    async def scenario() -> None:
        limit = BodyLimit(read_all, max_body_bytes=10, max_in_flight_bytes=25)
        scope: dict[str, Any] = {"type": "http", "headers": []}
        stalled = [Stalled(b"x" * size) for size in (8, 9, 7)]
        tasks = [asyncio.ensure_future(limit(scope, one.receive, one.send)) for one in stalled]
        await asyncio.sleep(0.01)
        new = FakeConnection(b"12345", b"12345")
        await limit(scope, new.receive, new.send)
        assert new.sent[0]["status"] == 200
        # The largest was enough.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [task.done() for task in tasks] == [False, True, False]
        assert stalled[1].sent[0]["status"] == 408
        assert b"upload_evicted" in stalled[1].sent[1]["body"]
        for task in (tasks[0], tasks[2]):
            task.cancel()
        # The cancellation of a request that was not evicted stays one.
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(scenario())
