"""Deadlines: one timer checks all connections, since a timer for each costs time at every request."""

import asyncio
from typing import Protocol

CHECK_SECONDS = 0.25


class Expiring(Protocol):
    def check_deadline(self, now: float) -> None:
        """Act if a deadline has passed. Units: seconds of the event loop's time."""
        ...


class Deadlines:
    def __init__(self) -> None:
        self._connections: set[Expiring] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Expiring, loop: asyncio.AbstractEventLoop) -> None:
        self._connections.add(connection)
        if self._timer is None:
            self._timer = loop.call_later(CHECK_SECONDS, self._check, loop)

    def discard(self, connection: Expiring) -> None:
        self._connections.discard(connection)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self._connections):
            connection.check_deadline(now)
        self._timer = loop.call_later(CHECK_SECONDS, self._check, loop) if self._connections else None
