"""Decoding: threads that turn image files into pixels, in a fair order and within a budget of memory.

Any thread opens the next image, and decodes it at once if that is cheap. A costly image waits for the others of its
kind: they leave one thread to the cheap ones, and share `max_bytes`. The memory of cheap images comes on top of it, at
most CHEAP_BYTES a thread.
"""

import heapq
import itertools
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from app.errors import QueueFull
from app.store.image_cost import DecodingCost

# A JPEG of any size is cheap if it is not progressive: it is decoded at a reduced size.
CHEAP_BYTES, CHEAP_SECONDS = 16_000_000, 0.1
# A costly image lets others pass that arrive within this multiple of its own time.
PATIENCE = 10.0
# Estimated time of the costly images that wait, per thread that decodes them.
MAX_BACKLOG_SECONDS = 10.0


class DecodeJob(Protocol):
    """One image of a request. Exactly one of `decode` and `refuse` follows a cost."""

    @property
    def request(self) -> object:
        """Return what all images of one request have in common."""

    def open(self) -> DecodingCost | None:
        """Estimate the cost; None if the image is refused or its request is over."""

    def decode(self) -> None: ...

    def refuse(self, error: QueueFull) -> None: ...


@dataclass(order=True)
class _Costly:
    """A costly image that waits. due: those with the earliest are next. Units: seconds of the clock."""

    due: float
    serial: int
    job: DecodeJob = field(compare=False)
    cost: DecodingCost = field(compare=False)


class DecodeQueue:
    """What waits to be opened or decoded, and what is next. Takes no lock and starts no thread."""

    def __init__(self, n_threads: int, max_bytes: int) -> None:
        self._n_costly_threads, self._max_bytes = max(1, n_threads - 1), max_bytes
        # Requests take turns: the first gives one image, and becomes the last.
        self._unopened: OrderedDict[object, deque[DecodeJob]] = OrderedDict()
        self._waiting: list[_Costly] = []
        self._n_running = self._n_running_bytes = 0
        self._serial = itertools.count()

    def add(self, job: DecodeJob) -> None:
        self._unopened.setdefault(job.request, deque()).append(job)

    def add_costly(self, job: DecodeJob, cost: DecodingCost, now: float) -> list[tuple[DecodeJob, QueueFull]]:
        """Add an opened image. Returns the images to refuse, because those that wait would take too long.

        These are the last in the order: a new image need not be among them.
        """
        earlier = [item.cost.seconds for item in self._waiting if item.job.request is job.request]
        due = now + PATIENCE * (sum(earlier) + cost.seconds)
        heapq.heappush(self._waiting, _Costly(due, next(self._serial), job, cost))
        return [(item.job, self._full()) for item in self._drop_last()]

    def _drop_last(self) -> list[_Costly]:
        """Remove the last images until the others take little enough time; a single one may take any."""
        dropped: list[_Costly] = []
        while len(self._waiting) > 1 and self._backlog_seconds > MAX_BACKLOG_SECONDS * self._n_costly_threads:
            dropped.append(max(self._waiting))
            self._waiting.remove(dropped[-1])
            heapq.heapify(self._waiting)
        return dropped

    @property
    def _backlog_seconds(self) -> float:
        return sum(item.cost.seconds for item in self._waiting)

    def _full(self) -> QueueFull:
        seconds = math.ceil(self._backlog_seconds / self._n_costly_threads)
        detail = f"{len(self._waiting)} costly images wait to be decoded, for about {seconds} s."
        return QueueFull(detail, retry_after_seconds=seconds)

    def take_costly(self, now: float) -> tuple[DecodeJob, DecodingCost] | None:
        """Take the next costly image if it may start: once it is due, or while nothing is unopened."""
        if not self._waiting or self._n_running == self._n_costly_threads:
            return None
        first = self._waiting[0]
        is_next = first.due <= now or not self._unopened
        if not is_next or (self._n_running and self._n_running_bytes + first.cost.n_bytes > self._max_bytes):
            return None
        heapq.heappop(self._waiting)
        self._n_running += 1
        self._n_running_bytes += first.cost.n_bytes
        return first.job, first.cost

    def end_costly(self, cost: DecodingCost) -> None:
        self._n_running -= 1
        self._n_running_bytes -= cost.n_bytes

    def take_unopened(self) -> DecodeJob | None:
        if not self._unopened:
            return None
        request, jobs = self._unopened.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._unopened[request] = jobs
        return job

    def withdraw(self, request: object) -> None:
        """Drop the images of a request that is over, and their bytes."""
        self._unopened.pop(request, None)
        self._waiting = [item for item in self._waiting if item.job.request is not request]
        heapq.heapify(self._waiting)


class Decoders:
    """The threads, and the queue under one lock."""

    def __init__(self, n_threads: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._n_threads, self._clock = n_threads, clock
        self._queue = DecodeQueue(n_threads, max_bytes)
        self._changed = threading.Condition()
        self._is_stopped = False

    def start(self) -> None:
        for index in range(self._n_threads):
            threading.Thread(target=self._work, name=f"decode_{index}", daemon=True).start()

    def stop(self) -> None:
        """Drop what waits. A thread ends after its image."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def submit(self, job: DecodeJob) -> None:
        with self._changed:
            self._queue.add(job)
            self._changed.notify()

    def withdraw(self, request: object) -> None:
        with self._changed:
            self._queue.withdraw(request)
            # What comes next may fit.
            self._changed.notify()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            work()
            # While this thread waits, it must not keep the request, and with it a version that may be dropped.
            del work

    def _next(self) -> Callable[[], None] | None:
        """Wait for work; None once stopped."""
        with self._changed:
            while not self._is_stopped:
                if (costly := self._queue.take_costly(self._clock())) is not None:
                    return lambda: self._decode_costly(*costly)
                if (job := self._queue.take_unopened()) is not None:
                    return lambda: self._open(job)
                self._changed.wait()
        return None

    def _open(self, job: DecodeJob) -> None:
        cost = job.open()
        if cost is None:
            return
        if cost.n_bytes <= CHEAP_BYTES and cost.seconds <= CHEAP_SECONDS:
            job.decode()
            return
        with self._changed:
            refused = self._queue.add_costly(job, cost, self._clock())
            self._changed.notify()
        for late, error in refused:
            late.refuse(error)

    def _decode_costly(self, job: DecodeJob, cost: DecodingCost) -> None:
        try:
            job.decode()
        finally:
            with self._changed:
                self._queue.end_costly(cost)
                self._changed.notify_all()
