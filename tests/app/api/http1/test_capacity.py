from dataclasses import dataclass

import pytest

from app.api.http1.capacity import Capacity


@dataclass(eq=False)
class Connection:
    name: str
    is_open: bool = True

    def abort(self) -> None:
        self.is_open = False


class Full:
    """A server of three connections."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.capacity = Capacity(3, self.refusals.append)
        self.connections = [Connection(str(index)) for index in range(3)]
        for connection in self.connections:
            self.capacity.add(connection)

    def closed_for(self, new: Connection) -> list[str]:
        """Return the names of the connections that a new one has closed."""
        self.capacity.add(new)
        return [one.name for one in (*self.connections, new) if not one.is_open]


@pytest.fixture
def full() -> Full:
    return Full()


def test_longest_idle_connection_makes_room(full: Full) -> None:
    first, second, _ = full.connections
    for one in (first, second):
        full.capacity.answer(one)
    full.capacity.await_request(first)
    full.capacity.await_request(second)
    # The third has been idle since it was opened.
    assert full.closed_for(Connection("new")) == ["2"]
    assert full.closed_for(Connection("newer")) == ["0", "2"]
    assert full.refusals == ["too_many_connections"] * 2


def test_upload_goes_only_where_none_is_idle(full: Full) -> None:
    for one in full.connections:
        full.capacity.await_body(one)
    idle = full.connections[1]
    full.capacity.await_request(idle)
    assert full.closed_for(Connection("new")) == ["1"]
    new = Connection("newer")
    full.capacity.answer(new)
    assert full.closed_for(new) == ["1"]


def test_requests_that_are_answered_are_never_lost(full: Full) -> None:
    for one in full.connections:
        full.capacity.answer(one)
    assert full.closed_for(Connection("new")) == ["new"]


def test_closed_connections_make_room(full: Full) -> None:
    full.capacity.discard(full.connections[0])
    assert full.closed_for(Connection("new")) == []
    # What a closed connection still does has no effect.
    full.capacity.await_request(full.connections[0])
    assert full.closed_for(Connection("newer")) == ["1"]
