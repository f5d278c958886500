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

from benchmarks.lone_caller import make_request
from benchmarks.open_loop import LOST, Call, Client, Exchange, arrival_times, effort, keep_busy, offer, run_measured

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
    """Answer so many requests of a connection, then close it."""

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


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    times = arrival_times(50, 100, 1)
    assert np.array_equal(times, arrival_times(50, 100, 1))
    assert len(times) != len(arrival_times(50, 100, 2))
    assert times[0] >= 0
    assert times[-1] < 100
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # as an exponential's


def test_answers_in_pieces_are_put_together_and_connections_kept() -> None:
    n_connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_connections
        n_connections += 1
        await answering(OK)(reader, writer)

    async def run() -> list[Exchange]:
        async with listening(count) as client:
            await client.connect(3)
            return await keep_busy(client, [REQUEST], 3, 0.2)

    exchanges = run_loop(run())
    assert n_connections == 3
    assert len(exchanges) > 3
    assert {(one.status, one.body) for one in exchanges} == {(200, b"ok")}
    assert all(one.latency_ms is not None and one.latency_ms > 0 for one in exchanges)


def test_arrivals_do_not_wait_for_answers() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def run() -> list[Exchange]:
        async with listening(never) as client:
            return await offer(client, [REQUEST] * 20, np.linspace(0, 0.1, 20), drain_seconds=0.1)

    exchanges = run_loop(run())
    assert [one.status for one in exchanges] == [LOST] * 20
    sent = [one.sent_at for one in exchanges]
    assert sent == sorted(sent)
    assert sent[-1] - sent[0] > 0.09  # and not all at once


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
def test_what_is_no_whole_answer_is_lost(answer: Answerer) -> None:
    async def run() -> list[Exchange]:
        async with listening(answer) as client:
            return await offer(client, [REQUEST, REQUEST], [0, 0.01], drain_seconds=0.3)

    exchanges = run_loop(run())
    assert [(one.status, one.latency_ms) for one in exchanges] == [(LOST, None)] * 2


def test_nobody_listening_is_lost_and_no_crash() -> None:
    async def run() -> list[Exchange]:
        async with listening(answering(OK)) as client:
            pass
        return await offer(client, [REQUEST], [0], drain_seconds=5)

    assert [one.status for one in run_loop(run())] == [LOST]


def test_a_closed_connection_is_replaced() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def run() -> list[Exchange]:
        async with listening(answering(closing, n_requests=1)) as client:
            await client.connect(1)
            return [exchange for _ in range(3) for exchange in await offer(client, [REQUEST], [0], drain_seconds=5)]

    assert [one.status for one in run_loop(run())] == [200] * 3


def test_hanging_up_sends_no_more_than_was_asked_for() -> None:
    received: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.close()

    async def run() -> list[Exchange]:
        async with listening(listen) as client:
            calls = [Call(REQUEST.data, len(REQUEST.data) - 2), Call(REQUEST.data, len(REQUEST.data))]
            return await offer(client, calls, [0, 0.05], drain_seconds=5)

    exchanges = run_loop(run())
    assert received == [REQUEST.data[:-2], REQUEST.data]
    assert [one.status for one in exchanges] == [LOST] * 2
    assert all(one.ended.done() for one in exchanges)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(OK)

    def log_message(self, *_: object) -> None:
        pass


def test_the_client_tells_its_own_effort() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        async def work(client: Client) -> list[Exchange]:
            assert not gc.isenabled()
            return await offer(client, [REQUEST] * 5, np.linspace(0, 0.05, 5), drain_seconds=5)

        exchanges, cpu_share = run_measured(server.server_port, 2, work)
        server.shutdown()
    assert [one.status for one in exchanges] == [200] * 5
    found = effort(exchanges, cpu_share)
    assert found.cpu_share > 0
    assert found.lag_p99_ms == pytest.approx(
        float(np.percentile([(one.sent_at - one.due_at) * 1e3 for one in exchanges], 99))
    )
    assert gc.isenabled()
    with pytest.raises(OSError, match="refused"):
        run_measured(server.server_port, 2, work)
