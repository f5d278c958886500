"""Engine: one thread for one device, and what waits for it. Each entry is the images of one request."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from app.backends import Answer, Pixels
from app.catalogue import ServedVariant
from app.errors import BackendError, InferenceFailed, ShuttingDown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """Of the images of one request; batch_sizes has one number per image: of how many its run was."""

    answer: Answer
    batch_sizes: list[int]
    queue_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class Entry:
    variant: ServedVariant
    pixels: Pixels
    future: Future[Inference]
    submitted_at: float


class Engine:
    """Runs entries in order. Every future resolves once: result, error, cancellation or shutdown."""

    def __init__(self, max_batch_images: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_batch_images = max_batch_images
        self._clock = clock
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing is put behind the None that stops the thread
        self._is_stopping = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __repr__(self) -> str:
        return f"<Engine waiting={self.n_waiting} alive={self._thread.is_alive()} stopping={self._is_stopping}>"

    @property
    def n_waiting(self) -> int:
        return self._entries.qsize()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Finish what runs, refuse what waits."""
        with self._gate:
            self._is_stopping = True
            self._entries.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def is_responsive(self, stall_seconds: float) -> bool:
        """Tell whether the thread lives and the present run has not lasted too long."""
        busy_since = self._busy_since
        return self._thread.is_alive() and (busy_since is None or self._clock() - busy_since < stall_seconds)

    def submit(self, variant: ServedVariant, pixels: Pixels) -> Future[Inference]:
        """Queue the images of one request. Admission has bounded how much waits.

        Shapes: pixels (n, H, W, 3), n >= 1.
        Raises: ShuttingDown.
        """
        future: Future[Inference] = Future()
        with self._gate:
            if self._is_stopping:
                raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
            self._entries.put(Entry(variant, pixels, future, self._clock()))
        return future

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            if not entry.future.set_running_or_notify_cancel():
                continue  # the caller has left
            if self._is_stopping:
                entry.future.set_exception(ShuttingDown("The service is shutting down.", retry_after_seconds=1))
                continue
            self._busy_since = self._clock()
            try:
                entry.future.set_result(self._infer(entry, self._busy_since))
            except BaseException as error:
                logger.exception("inference failed: %s", entry.variant.entry.id)
                entry.future.set_exception(InferenceFailed())
                if not isinstance(error, Exception):
                    return  # the thread ends, and liveness tells
            finally:
                self._busy_since = None

    def _infer(self, entry: Entry, started_at: float) -> Inference:
        size = self._max_batch_images
        batches = [entry.pixels[start : start + size] for start in range(0, len(entry.pixels), size)]
        answers = [self._run_batch(entry.variant, batch) for batch in batches]
        seconds = self._clock() - started_at
        if len(entry.pixels) == 1:
            entry.variant.latency.add(seconds)
        sizes = [len(batch) for batch in batches for _ in batch]
        return Inference(_joined(answers), sizes, started_at - entry.submitted_at, seconds)

    def _run_batch(self, variant: ServedVariant, batch: Pixels) -> Answer:
        answer = variant.runner.run(batch)
        for array in (answer.logits, answer.tokens, answer.gmacs):
            if array is not None and (len(array) != len(batch) or not np.isfinite(array).all()):
                raise BackendError(
                    f"the graph answered {array.shape} with {np.count_nonzero(~np.isfinite(array))} not finite"
                )
        return answer


def _joined(answers: Sequence[Answer]) -> Answer:
    """Lay the answers for several batches end to end."""
    columns = zip(*((answer.logits, answer.tokens, answer.gmacs) for answer in answers), strict=True)
    return Answer(*(None if parts[0] is None else np.concatenate(parts) for parts in columns))  # type: ignore[arg-type]
