"""Body: what a caller sends, held in the proxy until its answer begins, so that it can be sent again."""

import asyncio
import contextlib

from starlette.types import Message, Receive

MAX_AHEAD_BYTES = 1_000_000  # a body up to this is read first, and travels with its request; a longer one streams
MAX_KEPT_BYTES = 100_000_000  # a longer one is not kept, and its request not sent again
GONE: Message = {"type": "http.disconnect"}


class Body:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._n_bytes = 0
        self._is_kept, self._is_whole, self._is_released = True, False, False
        self.has_left = False

    @property
    def can_be_sent(self) -> bool:
        return self._is_kept and not self.has_left

    @property
    def whole(self) -> bytes | None:
        """What has been read ahead, if that is all."""
        return b"".join(message["body"] for message in self._kept) if self._is_whole else None

    async def read_ahead(self) -> None:
        """Read until the body is whole or long, or its caller leaves."""
        while not self.has_left and self._n_bytes <= MAX_AHEAD_BYTES:
            if not (await self._read()).get("more_body", False):
                self._is_whole = not self.has_left
                return

    def replay(self) -> Receive:
        """Make a `receive` that begins with what was read, unless that travels with the request, and then reads on."""
        kept = iter(() if self._is_whole else tuple(self._kept))

        async def receive() -> Message:
            if self._is_released and not self._is_whole:
                return GONE
            return next(kept, None) or await self._read()

        return receive

    def release(self) -> None:
        """Keep it no longer, and read no more of it for a replica."""
        self._is_kept, self._is_released = False, True
        self._kept = []

    async def swallow(self, seconds: float) -> None:
        """Read what still comes, for a while: to close at once would reset the connection before its answer is read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.has_left and (await self._read()).get("more_body", False):
                    pass

    async def _read(self) -> Message:
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > MAX_KEPT_BYTES:
            self._is_kept = False
            self._kept.clear()
        if self._is_kept:
            self._kept.append(message)
        return message
