"""Exchange: one request and its response, between a connection and the application (ASGI)."""

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.errors import ServiceError

if TYPE_CHECKING:
    from app.api.http1.connection import Connection

# After an early response, as much of the body is read so that the connection can serve the next request.
MAX_REST_BYTES = 1_000_000


class Exchange(RequestResponseCycle):
    """Uvicorn's, except that a body can fail, and that the connection decides how it closes."""

    def __init__(self, connection: "Connection", scope: Any, *, expects_continue: bool, is_kept_alive: bool) -> None:
        super().__init__(
            scope=scope,
            transport=connection.output,  # type: ignore[arg-type]
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expects_continue,
            keep_alive=is_kept_alive,
            on_response=connection.on_response_complete,
        )
        self._connection = connection
        self._error: ServiceError | None = None

    def fail(self, error: ServiceError) -> None:
        """Make `receive` raise this error: the body will not be complete."""
        self._error = error
        self.keep_alive = False
        self.message_event.set()

    async def receive(self) -> Any:
        """Raises: the error of the body."""
        message: Any = None
        if self._error is None:
            message = await super().receive()
        if self._error is not None and not self.disconnected and not self.response_complete:
            raise self._error
        return message or {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._decide_to_close()
        await super().send(message)

    def _decide_to_close(self) -> None:
        """Close after an early response if the rest of the body is long, or if it may never come."""
        n_left = self._connection.n_left_of_body or 0
        if self.more_body and (self.waiting_for_100_continue or n_left > MAX_REST_BYTES):
            self.keep_alive = False


class Output:
    """What uvicorn's cycles see of the transport. At the end of a response the connection decides how it closes."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        cycle = self._connection.cycle
        # Otherwise the application failed, and only closing at once can tell the client.
        if cycle is None or not cycle.response_complete:
            self._connection.transport.close()
