"""Connections: makes the connections of a server."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from app.api.http1.capacity import Capacity
from app.api.http1.connection import Connection
from app.api.http1.deadlines import Deadlines
from app.api.http1.timeouts import Timeouts


class Connections:
    """Given to uvicorn as its protocol class. The connections share one timer."""

    def __init__(self, timeouts: Timeouts, max_connections: int, count_refusal: Callable[[str], None]) -> None:
        self._timeouts, self._count_refusal = timeouts, count_refusal
        self._deadlines, self._capacity = Deadlines(), Capacity(max_connections, count_refusal)

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        loop = _loop or asyncio.get_running_loop()
        shared = (self._timeouts, self._deadlines, self._capacity, self._count_refusal)
        return Connection(config, server_state, app_state, loop, *shared)
