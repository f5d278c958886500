"""Open loop: requests leave when they are due, whether or not earlier ones were answered, as independent callers do.

The client shares the server's cores, so it does little: request bytes are built before, connections are kept, answers
are only stored. It tells how late it was itself, for a late client measures its own queue.
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

from benchmarks.lone_caller import HEAD_END, LENGTH
from benchmarks.report import percentile

T = TypeVar("T")
LOST = 0  # the status of a request that got no answer
FIRST_SECONDS = 0.05  # from the start of a run to its first possible arrival
clock = time.perf_counter  # the event loop's own stands still while it works, and counts whole milliseconds


@dataclass(frozen=True)
class Call:
    """A request's bytes. hang_up_after: so many of them are sent, and then the connection is closed."""

    data: bytes
    hang_up_after: int | None = None


@dataclass(eq=False)
class Exchange:
    """One request as the client saw it. Units: s by `clock`; answered_at is that of the last byte."""

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
class Effort:
    """What the client itself did. cpu_share: of one core; lag: how much later than due requests were sent."""

    cpu_share: float
    lag_p99_ms: float


def arrival_times(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw a Poisson process. Units: arrivals/s. Shapes: (n,), ascending, below `seconds`."""
    rng = np.random.default_rng(seed)
    n_images = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0, seconds, n_images))  # given their number, arrivals are uniform


class Wire(asyncio.Protocol):
    """One connection, with one request on it at a time."""

    def __init__(self, release: Callable[[Wire], None], forget: Callable[[Wire], None]) -> None:
        self._release, self._forget = release, forget
        self._exchange: Exchange | None = None
        self._answer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, call: Call, exchange: Exchange) -> None:
        self._exchange = exchange
        exchange.sent_at = clock()
        self._transport.write(call.data[: call.hang_up_after])
        if call.hang_up_after is not None:
            self._transport.close()  # what was written is still sent

    def data_received(self, data: bytes) -> None:
        self._answer += data
        end = self._answer.find(HEAD_END)
        if end < 0:
            return
        head = bytes(self._answer[:end])
        length = LENGTH.search(head)
        if length is None or self._exchange is None:  # no answer that could be matched to a request
            self._transport.abort()
            return
        if len(self._answer) >= end + len(HEAD_END) + int(length[1]):
            self._finish(self._exchange, head, bytes(self._answer[end + len(HEAD_END) :]))

    def _finish(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        exchange.answered_at = clock()
        exchange.status, exchange.head, exchange.body = int(head[9:12]), head, body
        self._exchange = None
        self._answer.clear()
        _end(exchange)
        if b"\r\nconnection: close" in head.lower():
            self._transport.close()
        elif not self._transport.is_closing():
            self._release(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._forget(self)
        if self._exchange is not None:
            _end(self._exchange)

    def close(self) -> None:
        self._transport.abort()


class Client:
    """Connections to one server: as many as there are requests under way, and kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wires: set[Wire] = set()
        self._idle: list[Wire] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def connect(self, n_connections: int) -> None:
        """Open connections beforehand, or opening them would be measured.

        Raises: OSError.
        """
        for _ in range(n_connections):
            self._idle.append(await self._open())

    async def _open(self) -> Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(lambda: Wire(self._idle.append, self._drop), "127.0.0.1", self._port)
        self._wires.add(wire)
        return wire

    def _drop(self, wire: Wire) -> None:
        self._wires.discard(wire)
        if wire in self._idle:
            self._idle.remove(wire)

    def send(self, call: Call, due_at: float | None = None) -> Exchange:
        """Send a request now; its `ended` resolves with the answer, or when the connection is lost."""
        loop = asyncio.get_running_loop()
        exchange = Exchange(clock() if due_at is None else due_at, loop.create_future())
        if self._idle:
            self._idle.pop().send(call, exchange)
        else:
            task = loop.create_task(self._send_on_new(call, exchange))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        return exchange

    async def _send_on_new(self, call: Call, exchange: Exchange) -> None:
        try:
            wire = await self._open()
        except OSError:
            exchange.sent_at = clock()
            _end(exchange)
        else:
            wire.send(call, exchange)

    async def close(self) -> None:
        for wire in list(self._wires):
            wire.close()
        await asyncio.sleep(0)


def _end(exchange: Exchange) -> None:
    if not exchange.ended.done():
        exchange.ended.set_result(None)


async def offer(client: Client, calls: Sequence[Call], times: Iterable[float], drain_seconds: float) -> list[Exchange]:
    """Send each request when it is due, then wait for the answers, but no longer than `drain_seconds`."""
    start = clock() + FIRST_SECONDS
    exchanges = []
    for call, seconds in zip(calls, times, strict=True):
        due_at = start + float(seconds)
        if (ahead := due_at - clock()) > 0:
            await asyncio.sleep(ahead)
        exchanges.append(client.send(call, due_at))
    if exchanges:
        await asyncio.wait([exchange.ended for exchange in exchanges], timeout=drain_seconds)
    return exchanges


async def keep_busy(client: Client, calls: Sequence[Call], n_callers: int, seconds: float) -> list[Exchange]:
    """Let some callers ask again as soon as they are answered: what a server can do at most."""
    until, turn = clock() + seconds, itertools.cycle(calls)
    exchanges = []

    async def call_again() -> None:
        while clock() < until:
            exchange = client.send(next(turn))
            await exchange.ended
            exchanges.append(exchange)
            if exchange.status == LOST:
                return

    await asyncio.gather(*(call_again() for _ in range(n_callers)))
    return exchanges


def run_measured(port: int, n_connections: int, work: Callable[[Client], Awaitable[T]]) -> tuple[T, float]:
    """Let a client work, its connections opened before. Returns also its share of a core.

    Raises: OSError if nobody listens.
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
    gc.disable()  # what the process imported is large, and looking through it takes long
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(connect_and_work())
    finally:
        gc.enable()


def effort(exchanges: Sequence[Exchange], cpu_share: float) -> Effort:
    lags = [(exchange.sent_at - exchange.due_at) * 1e3 for exchange in exchanges if exchange.sent_at]
    return Effort(cpu_share, percentile(lags, 99) or 0.0)
