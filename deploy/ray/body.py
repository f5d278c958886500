"""Body: a request body, kept in the proxy until the answer starts, so that the request can be retried."""

from starlette.types import Message, Receive

from app.errors import ServiceError

# A body up to this size is read completely and sent with its request; a longer one is streamed.
MAX_AHEAD_BYTES = 1_000_000
# A request with a longer body is not retried.
MAX_KEPT_BYTES = 100_000_000
DISCONNECT: Message = {"type": "http.disconnect"}


class Body:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._n_bytes = 0
        self._is_kept, self._is_complete, self._is_released = True, False, False
        self.is_disconnected = False
        # Why the body cannot be read to its end, for the client.
        self.error: ServiceError | None = None

    @property
    def can_be_sent(self) -> bool:
        return self._is_kept and not self.is_disconnected

    @property
    def complete(self) -> bytes | None:
        """The body, if it has been read ahead completely."""
        return b"".join(message["body"] for message in self._kept) if self._is_complete else None

    async def read_ahead(self) -> None:
        """Read until the body is complete or long, or the client disconnects."""
        while not self.is_disconnected and self._n_bytes <= MAX_AHEAD_BYTES:
            if not (await self._read()).get("more_body", False):
                self._is_complete = not self.is_disconnected
                return

    def replay(self) -> Receive:
        """Make a `receive` that repeats what was read and then reads on. A complete body is sent with its request."""
        kept = iter(() if self._is_complete else tuple(self._kept))

        async def receive() -> Message:
            if self._is_released and not self._is_complete:
                return DISCONNECT
            return next(kept, None) or await self._read()

        return receive

    def release(self) -> None:
        """Drop the kept body, and read no more of it for a replica."""
        self._is_kept, self._is_released = False, True
        self._kept = []

    async def _read(self) -> Message:
        try:
            message = await self._receive()
        except ServiceError as error:
            self.error, message = error, DISCONNECT
        self.is_disconnected = self.is_disconnected or message["type"] == "http.disconnect"
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > MAX_KEPT_BYTES:
            self._is_kept = False
            self._kept.clear()
        if self._is_kept:
            self._kept.append(message)
        return message
