"""Pending request: decode its images concurrently, queue them together, collect their results."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from app.backends import Pixels
from app.errors import InternalError, ServiceError
from app.serving.engine import Engine
from app.serving.entry import Entry, Outcome, Outcomes, Reply

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """Units: seconds of time.perf_counter."""

    pixels: Pixels
    started_at: float
    seconds: float


MakeEntry = Callable[[Decoded, Reply], Entry]


class PendingRequest:
    """A request in flight, shared by three kinds of threads.

    The event loop waits for `completed`. Decoder threads decode, and the last to finish queues all entries. The
    engine's workers run them. Only the event loop calls `complete`, `fail` and `cancel`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine, n_images: int, make_entry: MakeEntry) -> None:
        self.completed: asyncio.Future[None] = loop.create_future()
        self.decoded: list[Decoded | ServiceError | None] = [None] * n_images
        self.outcomes: dict[Entry, Outcome] = {}
        self.entries: list[Entry] = []
        self._loop, self._engine, self._make_entry = loop, engine, make_entry
        self._n_missing = n_images
        # Ensures that nothing is queued after `cancel`.
        self._lock = threading.Lock()
        self._is_over = False

    def decode(self, place: int, work: Callable[[], Pixels]) -> None:
        """Decode one image, unless the request was cancelled. For a decoder thread."""
        if self._is_over:
            return
        try:
            started_at = time.perf_counter()
            try:
                pixels = work()
            except ServiceError as error:
                self.decoded[place] = error
            else:
                self.decoded[place] = Decoded(pixels, started_at, time.perf_counter() - started_at)
            self._count_decoded()
        except ServiceError as error:
            self._loop.call_soon_threadsafe(self.fail, error)
        except Exception:
            logger.exception("unexpected error")
            self._loop.call_soon_threadsafe(self.fail, InternalError())

    def _count_decoded(self) -> None:
        with self._lock:
            self._n_missing -= 1
            if self._n_missing or self._is_over:
                return
            entries = [self._make_entry(item, self.complete) for item in self.decoded if isinstance(item, Decoded)]
            if entries:
                self._queue(entries)
                return
        self._loop.call_soon_threadsafe(self.complete, ())

    def _queue(self, entries: list[Entry]) -> None:
        # Set before the engine can answer one of them.
        self.entries = entries
        try:
            self._engine.submit(entries)
        except ServiceError:
            self.entries = []
            raise

    def complete(self, outcomes: Outcomes) -> None:
        """Store outcomes; the last ones complete the request. For the event loop."""
        self.outcomes.update(outcomes)
        if len(self.outcomes) == len(self.entries) and not self.completed.done():
            self.completed.set_result(None)

    def fail(self, error: ServiceError) -> None:
        """Fail the whole request. For the event loop."""
        if not self.completed.done():
            self.completed.set_exception(error)

    def cancel(self) -> tuple[int, int]:
        """Withdraw the entries without an outcome; a completed request has none.

        Returns: the number of images withdrawn from the queue, and of those already running.
        """
        with self._lock:
            self._is_over = True
            left = [entry for entry in self.entries if entry not in self.outcomes]
        n_waiting = self._engine.withdraw(left) if left else 0
        for entry in self.entries:
            # Breaks a reference cycle that would keep the pixels, and a dropped model version, in memory.
            entry.reply = None
        return n_waiting, len(left) - n_waiting

    def results(self) -> list[Outcome]:
        """List the result or the error of each image, in the request's order."""
        entries = iter(self.entries)
        return [
            self.outcomes[next(entries)] if isinstance(item, Decoded) else item
            for item in self.decoded
            if item is not None
        ]
