"""Body limit: caps the size of one request body, and of all bodies in flight together.

A body is refused by its Content-Length before it is read, or while it streams. The second cap bounds the memory that
many slow uploads of large bodies can hold. When it is reached, the slowest upload is evicted: a client that has stalled
must not keep others out.
"""

import asyncio
import time
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, QueueFull, UploadEvicted

# An upload slower than this is evicted for a new one of any speed; a faster one only for one that is faster still.
STALLED_BYTES_PER_SECOND = 10_000
# Rates are those of the last one to two such intervals.
RATE_SECONDS = 0.5
# A new upload waits for others to complete or to stall, before it is refused. Only so many wait.
ROOM_SECONDS = 2.0
ROOM_CHECK_SECONDS = 0.05
MAX_WAITING = 16


class BodyLimit:
    """Pure ASGI middleware. The application sees BodyTooLarge, QueueFull or UploadEvicted raised from `receive`."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_in_flight_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._in_flight = _InFlight(max_in_flight_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _CountedBody(scope, receive, send, self._max_body_bytes, self._in_flight)
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            body.release()


class _InFlight:
    """Bytes received for the requests that are not answered yet."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        # Uploads that wait for their client, or for room.
        self.receiving: set[_CountedBody] = set()
        self._n_waiting = 0

    async def make_room(self, body: "_CountedBody") -> bool:
        """Evict slower uploads until the bytes in flight are within the limit. Returns whether they are."""
        now = time.monotonic()
        until, rate = now + ROOM_SECONDS, max(STALLED_BYTES_PER_SECOND, body.rate(now))
        while self.n_bytes > self.max_bytes:
            now = time.monotonic()
            others = (other for other in self.receiving if other is not body)
            slowest = min(others, key=lambda other: other.precedence(now), default=None)
            if slowest is not None and slowest.rate(now) < rate:
                slowest.evict()
            elif slowest is None or now >= until or self._n_waiting >= MAX_WAITING:
                return False
            else:
                await self._wait()
        return True

    async def _wait(self) -> None:
        self._n_waiting += 1
        try:
            await asyncio.sleep(ROOM_CHECK_SECONDS)
        finally:
            self._n_waiting -= 1


class _Rate:
    """The rate at which bytes arrive now, whatever it was before."""

    def __init__(self) -> None:
        self._started_at = self._slot_at = time.monotonic()
        self._n_slot = self._n_previous = 0

    def add(self, n_bytes: int, now: float) -> None:
        self._turn(now)
        self._n_slot += n_bytes

    def at(self, now: float) -> float:
        """Units: bytes per second."""
        self._turn(now)
        seconds = min(now - self._started_at, RATE_SECONDS + now - self._slot_at)
        return (self._n_previous + self._n_slot) / max(seconds, ROOM_CHECK_SECONDS)

    def _turn(self, now: float) -> None:
        n_slots = int((now - self._slot_at) / RATE_SECONDS)
        if n_slots:
            self._n_previous, self._n_slot = self._n_slot if n_slots == 1 else 0, 0
            self._slot_at += n_slots * RATE_SECONDS


class _CountedBody:
    """The body of one request, counted as it is received."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int, in_flight: _InFlight) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._in_flight = max_bytes, in_flight
        headers = dict(scope["headers"])
        # The server has refused a length that is not a number.
        declared = headers.get(b"content-length", b"")
        self._is_declared_too_large = declared.isdigit() and int(declared[:20]) > max_bytes
        self._n_bytes = self.n_kept = 0
        self._rate = _Rate()
        self._is_complete = self._is_refused = self._is_evicted = self._is_released = False
        self._receiving: asyncio.Task[object] | None = None

    def rate(self, now: float) -> float:
        return self._rate.at(now)

    def precedence(self, now: float) -> tuple[float, int]:
        """Return a key by which uploads are evicted: first the largest of the stalled ones, then the slowest."""
        return max(STALLED_BYTES_PER_SECOND, self.rate(now)), -self.n_kept

    async def receive(self) -> Message:
        """Raises: BodyTooLarge, before the first byte if Content-Length says so; QueueFull; UploadEvicted."""
        if self._is_declared_too_large:
            self._refuse_size()
        if self._is_complete:
            # Only a disconnect can follow.
            return await self._receive()
        self._receiving = asyncio.current_task()
        self._in_flight.receiving.add(self)
        try:
            return await self._receive_counted()
        except asyncio.CancelledError:
            if not self._is_evicted or self._receiving is None or self._receiving.uncancel():
                raise
        finally:
            self._in_flight.receiving.discard(self)
        self._is_refused = True
        raise UploadEvicted(
            "The upload was too slow while the request bodies in flight reached their limit.", retry_after_seconds=1
        )

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        n_bytes = len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        self._n_bytes += n_bytes
        self._rate.add(n_bytes, time.monotonic())
        if not self._is_released:
            self.n_kept += n_bytes
            self._in_flight.n_bytes += n_bytes
        if self._n_bytes > self._max_bytes:
            self._refuse_size()
        if self._in_flight.n_bytes > self._in_flight.max_bytes and not await self._in_flight.make_room(self):
            self._is_refused = True
            detail = f"Request bodies in flight exceed {self._in_flight.max_bytes} bytes."
            raise QueueFull(detail, retry_after_seconds=1)
        return message

    def _refuse_size(self) -> NoReturn:
        self._is_refused = True
        raise BodyTooLarge(f"Request body exceeds {self._max_bytes} bytes.", max_body_bytes=self._max_bytes)

    def evict(self) -> None:
        """End the upload. `receive` raises UploadEvicted."""
        self._is_evicted = True
        self._in_flight.receiving.discard(self)
        self.release()
        if self._receiving is not None:
            self._receiving.cancel()

    def release(self) -> None:
        """Subtract this body from the bytes in flight, and count no more of it."""
        self._is_released = True
        self._in_flight.n_bytes -= self.n_kept
        self.n_kept = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # A client may read its response slowly.
            self.release()
            if self._is_refused:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)
