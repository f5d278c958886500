"""Capacity: bounds the number of connections. A full server makes room for a new one."""

from collections.abc import Callable
from typing import Protocol

from app.errors import TOO_MANY_CONNECTIONS


class Closable(Protocol):
    def abort(self) -> None:
        """Close at once."""
        ...


class Capacity:
    """The open connections, by what they wait for.

    When there are too many, the connection goes that has waited longest for its client: first those between requests
    or in a head, then those in a body. Requests that are being answered are never lost; if there is nothing else, the
    new connection goes.
    """

    def __init__(self, max_connections: int, count_refusal: Callable[[str], None]) -> None:
        self._max, self._count_refusal = max_connections, count_refusal
        self._open: set[Closable] = set()
        # Dictionaries for their order: the first has waited longest.
        self._idle: dict[Closable, None] = {}
        self._receiving: dict[Closable, None] = {}

    def add(self, connection: Closable) -> None:
        """Add a new connection, for which another may have to go."""
        if len(self._open) >= self._max:
            victim = next(iter(self._idle), None) or next(iter(self._receiving), connection)
            self.discard(victim)
            self._count_refusal(TOO_MANY_CONNECTIONS)
            victim.abort()
            if victim is connection:
                return
        self._open.add(connection)
        self._idle[connection] = None

    def discard(self, connection: Closable) -> None:
        self._open.discard(connection)
        self.answer(connection)

    def await_request(self, connection: Closable) -> None:
        """The client has no request in flight, or is to close the connection."""
        if connection in self._open:
            self._receiving.pop(connection, None)
            self._idle[connection] = None

    def await_body(self, connection: Closable) -> None:
        if connection in self._open:
            self._idle.pop(connection, None)
            self._receiving[connection] = None

    def answer(self, connection: Closable) -> None:
        """The request is complete: the client waits for the server."""
        self._idle.pop(connection, None)
        self._receiving.pop(connection, None)
