import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import numpy as np
import pytest
import uvloop

from benchmarks.load.http1 import make_request
from benchmarks.load.open_loop import (
    LOST,
    Call,
    CallResult,
    Client,
    arrival_times,
    client_load,
    offer,
    run_measured,
    saturate,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REQUEST = Call(make_request("/", b"12345"))
T = TypeVar("T")
Answerer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@asynccontextmanager
async def listening(answer: Answerer) -> AsyncIterator[Client]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = Client(server.sockets[0].getsockname()[1])
    try:
        yield client
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


def answering(data: bytes, *, n_requests: int = 1_000_000, closes: bool = True) -> Answerer:
    """Answer a number of requests per connection, then close it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(n_requests):
                await reader.readuntil(b"12345")
                writer.write(data[:20])
                await writer.drain()
                writer.write(data[20:])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        if closes:
            writer.close()

    return answer


def test_arrivals_are_a_seeded_poisson_process() -> None:
    times = arrival_times(50, 100, 1)
    assert np.array_equal(times, arrival_times(50, 100, 1))
    assert len(times) != len(arrival_times(50, 100, 2))
    assert times[0] >= 0
    assert times[-1] < 100
    # The gaps of a Poisson process are exponential: mean and standard deviation are equal.
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)


def test_split_responses_are_assembled_and_connections_kept() -> None:
    n_connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_connections
        n_connections += 1
        await answering(OK)(reader, writer)

    async def run() -> list[CallResult]:
        async with listening(count) as client:
            await client.connect(3)
            return await saturate(client, [REQUEST], 3, 0.2)

    results = run_loop(run())
    assert n_connections == 3
    assert len(results) > 3
    assert {(one.status, one.body) for one in results} == {(200, b"ok")}
    assert all(one.latency_ms is not None and one.latency_ms > 0 for one in results)


def test_arrivals_do_not_wait_for_responses() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def run() -> list[CallResult]:
        async with listening(never) as client:
            return await offer(client, [REQUEST] * 20, np.linspace(0, 0.1, 20), drain_seconds=0.1)

    results = run_loop(run())
    assert [one.status for one in results] == [LOST] * 20
    sent = [one.sent_at for one in results]
    assert sent == sorted(sent)
    # Not all at once.
    assert sent[-1] - sent[0] > 0.09


@pytest.mark.parametrize(
    "answer",
    [
        answering(b"", n_requests=0),
        answering(OK[:-1]),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        answering(OK[:30], n_requests=1),
    ],
    ids=["closes", "cut off", "no length", "half a head"],
)
def test_incomplete_responses_are_lost(answer: Answerer) -> None:
    async def run() -> list[CallResult]:
        async with listening(answer) as client:
            return await offer(client, [REQUEST, REQUEST], [0, 0.01], drain_seconds=0.3)

    results = run_loop(run())
    assert [(one.status, one.latency_ms) for one in results] == [(LOST, None)] * 2


def test_refused_connections_are_lost_requests() -> None:
    async def run() -> list[CallResult]:
        async with listening(answering(OK)) as client:
            pass
        return await offer(client, [REQUEST], [0], drain_seconds=5)

    assert [one.status for one in run_loop(run())] == [LOST]


def test_a_closed_connection_is_replaced() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def run() -> list[CallResult]:
        async with listening(answering(closing, n_requests=1)) as client:
            await client.connect(1)
            return [result for _ in range(3) for result in await offer(client, [REQUEST], [0], drain_seconds=5)]

    assert [one.status for one in run_loop(run())] == [200] * 3


def test_hanging_up_sends_exactly_the_requested_bytes() -> None:
    received: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.close()

    async def run() -> list[CallResult]:
        async with listening(listen) as client:
            calls = [Call(REQUEST.data, len(REQUEST.data) - 2), Call(REQUEST.data, len(REQUEST.data))]
            return await offer(client, calls, [0, 0.05], drain_seconds=5)

    results = run_loop(run())
    assert received == [REQUEST.data[:-2], REQUEST.data]
    assert [one.status for one in results] == [LOST] * 2
    assert all(one.ended.done() for one in results)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(OK)

    def log_message(self, *_: object) -> None:
        pass


def test_the_client_measures_its_own_load() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        async def work(client: Client) -> list[CallResult]:
            assert not gc.isenabled()
            return await offer(client, [REQUEST] * 5, np.linspace(0, 0.05, 5), drain_seconds=5)

        results, cpu_share = run_measured(server.server_port, 2, work)
        server.shutdown()
    assert [one.status for one in results] == [200] * 5
    found = client_load(results, cpu_share)
    assert found.cpu_share > 0
    assert found.lag_p99_ms == pytest.approx(
        float(np.percentile([(one.sent_at - one.due_at) * 1e3 for one in results], 99))
    )
    assert gc.isenabled()
    with pytest.raises(OSError, match="refused"):
        run_measured(server.server_port, 2, work)
