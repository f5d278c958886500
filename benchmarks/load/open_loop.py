"""Open-loop load: requests are sent at their arrival times, even while earlier ones are in flight.

The client shares the server's cores, so it does little: requests are built beforehand, connections
are kept open, and responses are only stored. It also measures its own lag, since a client that
falls behind measures its own queue.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.load.http1 import CONTENT_LENGTH, HEAD_END
from benchmarks.spread import percentile

T = TypeVar("T")
# The status of a request without a response.
LOST = 0
# From the start of a run to its first possible arrival.
LEAD_SECONDS = 0.05
# The event loop's own clock has a resolution of 1 ms, and stands still during callbacks.
clock = time.perf_counter


@dataclass(frozen=True)
class Call:
    """The bytes of a request. hang_up_after: send this many bytes, then close the connection."""

    data: bytes
    hang_up_after: int | None = None


@dataclass(eq=False)
class CallResult:
    """One call as the client saw it. Units: s by `clock`. answered_at: arrival of the last byte."""

    due_at: float
    ended: asyncio.Future[None] = field(repr=False)
    sent_at: float = 0.0
    answered_at: float | None = None
    status: int = LOST
    head: bytes = b""
    body: bytes = b""

    @property
    def latency_ms(self) -> float | None:
        return None if self.answered_at is None else (self.answered_at - self.sent_at) * 1e3


@dataclass(frozen=True)
class ClientLoad:
    """Load of the client. cpu_share: of one core. lag: from arrival times to sending."""

    cpu_share: float
    lag_p99_ms: float


def arrival_times(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw a Poisson process. Units: arrivals/s. Shapes: (n,), ascending, below `seconds`."""
    rng = np.random.default_rng(seed)
    n_arrivals = rng.poisson(rate * seconds)
    # Given their number, the arrivals of a Poisson process are uniform.
    return np.sort(rng.uniform(0, seconds, n_arrivals))


class Connection(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self, release: Callable[[Connection], None], forget: Callable[[Connection], None]) -> None:
        self._release, self._forget = release, forget
        self._result: CallResult | None = None
        self._response = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, call: Call, result: CallResult) -> None:
        self._result = result
        result.sent_at = clock()
        self._transport.write(call.data[: call.hang_up_after])
        if call.hang_up_after is not None:
            # The transport sends what was written before it closes.
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._response += data
        end = self._response.find(HEAD_END)
        if end < 0:
            return
        head = bytes(self._response[:end])
        length = CONTENT_LENGTH.search(head)
        if length is None or self._result is None:
            # This response cannot be matched to a request.
            self._transport.abort()
            return
        if len(self._response) >= end + len(HEAD_END) + int(length[1]):
            self._finish(self._result, head, bytes(self._response[end + len(HEAD_END) :]))

    def _finish(self, result: CallResult, head: bytes, body: bytes) -> None:
        result.answered_at = clock()
        result.status, result.head, result.body = int(head[9:12]), head, body
        self._result = None
        self._response.clear()
        _end(result)
        if b"\r\nconnection: close" in head.lower():
            self._transport.close()
        elif not self._transport.is_closing():
            self._release(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._forget(self)
        if self._result is not None:
            _end(self._result)

    def close(self) -> None:
        self._transport.abort()


class Client:
    """Keep-alive connections to one server, at least one per request in flight."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def connect(self, n_connections: int) -> None:
        """Open connections before the measurement, so that it does not include connecting.

        Raises: OSError.
        """
        for _ in range(n_connections):
            self._idle.append(await self._open())

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._idle.append, self._drop), "127.0.0.1", self._port
        )
        self._connections.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def send(self, call: Call, due_at: float | None = None) -> CallResult:
        """Send a request now. `ended` resolves with the response, or when the connection is lost."""
        loop = asyncio.get_running_loop()
        result = CallResult(clock() if due_at is None else due_at, loop.create_future())
        if self._idle:
            self._idle.pop().send(call, result)
        else:
            task = loop.create_task(self._send_on_new(call, result))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        return result

    async def _send_on_new(self, call: Call, result: CallResult) -> None:
        try:
            connection = await self._open()
        except OSError:
            result.sent_at = clock()
            _end(result)
        else:
            connection.send(call, result)

    async def close(self) -> None:
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)


def _end(result: CallResult) -> None:
    if not result.ended.done():
        result.ended.set_result(None)


async def offer(
    client: Client, calls: Sequence[Call], times: Iterable[float], drain_seconds: float
) -> list[CallResult]:
    """Send each request at its time, then wait up to `drain_seconds` for the responses."""
    start = clock() + LEAD_SECONDS
    results = []
    for call, seconds in zip(calls, times, strict=True):
        due_at = start + float(seconds)
        if (ahead := due_at - clock()) > 0:
            await asyncio.sleep(ahead)
        results.append(client.send(call, due_at))
    if results:
        await asyncio.wait([result.ended for result in results], timeout=drain_seconds)
    return results


async def saturate(client: Client, calls: Sequence[Call], concurrency: int, seconds: float) -> list[CallResult]:
    """Keep a number of requests in flight: a closed loop, which measures capacity."""
    until, cycled = clock() + seconds, itertools.cycle(calls)
    results = []

    async def send_next() -> None:
        while clock() < until:
            result = client.send(next(cycled))
            await result.ended
            results.append(result)
            if result.status == LOST:
                return

    await asyncio.gather(*(send_next() for _ in range(concurrency)))
    return results


def run_measured(port: int, n_connections: int, work: Callable[[Client], Awaitable[T]]) -> tuple[T, float]:
    """Run a client with open connections. Returns also the CPU time that it used, as a share of one core.

    Raises: OSError if connections are refused.
    """

    async def connect_and_work() -> tuple[T, float]:
        client = Client(port)
        await client.connect(n_connections)
        wall, cpu = clock(), time.process_time()
        result = await work(client)
        cpu_share = (time.process_time() - cpu) / (clock() - wall)
        await client.close()
        return result, cpu_share

    gc.collect()
    # The imported libraries make a large heap, so a collection takes long.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(connect_and_work())
    finally:
        gc.enable()


def client_load(results: Sequence[CallResult], cpu_share: float) -> ClientLoad:
    lags = [(result.sent_at - result.due_at) * 1e3 for result in results if result.sent_at]
    return ClientLoad(cpu_share, percentile(lags, 99) or 0.0)
