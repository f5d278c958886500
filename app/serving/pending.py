"""Pending request: decode its images concurrently, queue them together, collect their results."""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from app.backends import Pixels
from app.errors import InternalError, QueueFull, ServiceError, TooManyPixels
from app.serving.engine import Engine
from app.serving.entry import Entry, Outcome, Outcomes, Reply
from app.store.image_cost import DecodingCost
from app.store.preprocessing import OpenedImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """wait_seconds: for a decoder thread, in the whole. Units: seconds of time.perf_counter."""

    pixels: Pixels
    started_at: float
    seconds: float
    wait_seconds: float = 0.0


MakeEntry = Callable[[Decoded, Reply], Entry]


class PendingRequest:
    """A request in flight, shared by three kinds of threads.

    The event loop waits for `completed`. Decoder threads decode, and the last to finish queues all entries. The
    engine's workers run them. Only the event loop calls `complete`, `fail` and `cancel`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        n_images: int,
        make_entry: MakeEntry,
        max_pixels: int = sys.maxsize,
    ) -> None:
        self.completed: asyncio.Future[None] = loop.create_future()
        self.decoded: list[Decoded | ServiceError | None] = [None] * n_images
        self.outcomes: dict[Entry, Outcome] = {}
        self.entries: list[Entry] = []
        self._loop, self._engine, self._make_entry = loop, engine, make_entry
        self._n_missing, self._n_pixels, self._max_pixels = n_images, 0, max_pixels
        # Ensures that nothing is queued after `cancel`.
        self._lock = threading.Lock()
        self._is_over = False

    @property
    def is_over(self) -> bool:
        return self._is_over

    def count_pixels(self, n_pixels: int) -> None:
        """Count the pixels of an image that is going to be decoded.

        Raises: TooManyPixels.
        """
        with self._lock:
            if self._n_pixels + n_pixels > self._max_pixels:
                detail = f"The images of the request have more than {self._max_pixels} pixels, with this one."
                raise TooManyPixels(detail, max_request_pixels=self._max_pixels)
            self._n_pixels += n_pixels

    def settle(self, place: int, read: Callable[[], Decoded]) -> None:
        """Store the pixels of one image, or the error that refuses it. For any thread."""
        try:
            try:
                self.decoded[place] = read()
            except ServiceError as error:
                self.decoded[place] = error
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


class ImageJob:
    """One image file of a request, for the decoder threads. Units: seconds of time.perf_counter."""

    def __init__(self, request: PendingRequest, place: int, open_file: Callable[[], OpenedImage]) -> None:
        self.request = request
        self._place, self._open_file = place, open_file
        self._opened: OpenedImage | None = None
        self._submitted_at = time.perf_counter()
        self._opening_seconds = 0.0

    def open(self) -> DecodingCost | None:
        """Estimate the cost; None if the image is refused or the request is over."""
        if self.request.is_over:
            return None
        started_at = time.perf_counter()
        try:
            self._opened = self._open_file()
            self.request.count_pixels(self._opened.cost.n_pixels)
        except Exception as error:  # noqa: BLE001 (`settle` tells expected errors from others)
            self._settle_with(error)
            return None
        self._opening_seconds = time.perf_counter() - started_at
        return self._opened.cost

    def decode(self) -> None:
        if not self.request.is_over:
            self.request.settle(self._place, self._decode)

    def refuse(self, error: QueueFull) -> None:
        self._settle_with(error)

    def _decode(self) -> Decoded:
        assert self._opened is not None
        started_at = time.perf_counter()
        pixels = self._opened.decode()
        ended_at = time.perf_counter()
        seconds = self._opening_seconds + ended_at - started_at
        return Decoded(pixels, ended_at - seconds, seconds, ended_at - self._submitted_at - seconds)

    def _settle_with(self, error: Exception) -> None:
        def fail() -> Decoded:
            raise error

        self.request.settle(self._place, fail)
