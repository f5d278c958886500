"""Flight: one request inside. Its images are decoded each for itself, queued together, and answered together."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.backends import Pixels
from app.errors import InternalError, ServiceError
from app.serving.engine import Engine, Outcome
from app.serving.entry import Done, Entry

logger = logging.getLogger(__name__)

MakeEntry = Callable[[Pixels, "Flight"], Entry]


@dataclass(frozen=True)
class Decoded:
    """Units: seconds of time.perf_counter."""

    pixels: Pixels
    started_at: float
    seconds: float


class Flight:
    """Goes through three threads: the loop's, which waits; a decoder's, which queues the images once the last of them
    is decoded; and the engine's. What the loop learns comes to it by `land`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine, n_images: int, make_entry: MakeEntry) -> None:
        self.landed: asyncio.Future[None] = loop.create_future()
        self.decoded: list[Decoded | ServiceError | None] = [None] * n_images
        self.outcomes: dict[Entry, Outcome] = {}
        self.entries: list[Entry] = []
        self._loop, self._engine, self._make_entry = loop, engine, make_entry
        self._n_missing = n_images
        self._gate = threading.Lock()  # nothing is queued once the caller has left
        self._is_over = False

    def decode(self, place: int, work: Callable[[], Pixels]) -> None:
        """Decode one image in this thread, unless the caller has left; the last one queues all."""
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
        with self._gate:
            self._n_missing -= 1
            if self._n_missing or self._is_over:
                return
            entries = [self._make_entry(item.pixels, self) for item in self.decoded if isinstance(item, Decoded)]
            if entries:
                self._queue(entries)
                return
        self._loop.call_soon_threadsafe(self.land, ())

    def _queue(self, entries: list[Entry]) -> None:
        self.entries = entries  # before an outcome can land
        try:
            self._engine.submit(entries)
        except ServiceError:
            self.entries = []
            raise

    def land(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        """Take in what became of some images; after the last, the caller goes on. For the loop's thread."""
        self.outcomes.update(outcomes)
        if len(self.outcomes) == len(self.entries) and not self.landed.done():
            self.landed.set_result(None)

    def fail(self, error: ServiceError) -> None:
        """End the request as a whole. For the loop's thread."""
        if not self.landed.done():
            self.landed.set_exception(error)

    def leave(self) -> tuple[int, int]:
        """Take back what has not begun. Returns how many images waited, and how many ran already."""
        with self._gate:
            self._is_over = True
            left = [entry for entry in self.entries if entry not in self.outcomes]
        n_waiting = self._engine.withdraw(left) if left else 0
        for entry in self.entries:
            entry.owner = None  # a cycle would keep the pixels, and a dropped version, until the collector comes
        return n_waiting, len(left) - n_waiting

    def results(self) -> list[tuple[float, Done] | ServiceError]:
        """List what became of each image, in their order: the seconds of its decoding and its answer, or its error."""
        entries = iter(self.entries)
        found: list[tuple[float, Done] | ServiceError] = []
        for item in self.decoded:
            if isinstance(item, Decoded):
                outcome = self.outcomes[next(entries)]
                found.append((item.seconds, outcome) if isinstance(outcome, Done) else outcome)
            elif item is not None:
                found.append(item)
        return found
