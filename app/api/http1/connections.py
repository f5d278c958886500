"""Connections: makes the connections of a server."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from app.api.http1.connection import Connection
from app.api.http1.deadlines import Deadlines
from app.api.http1.timeouts import Timeouts


class Connections:
    """Given to uvicorn as its protocol class. The connections share one timer."""

    def __init__(self, timeouts: Timeouts, count_refusal: Callable[[str], None]) -> None:
        self._timeouts, self._count_refusal = timeouts, count_refusal
        self._deadlines = Deadlines()

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        loop = _loop or asyncio.get_running_loop()
        return Connection(config, server_state, app_state, loop, self._timeouts, self._deadlines, self._count_refusal)
