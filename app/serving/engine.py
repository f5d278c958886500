"""Engine: the worker threads of one device. A worker gets a batch from the scheduler, runs it and delivers the results.

Several workers share the device: while one waits for the GIL, another keeps the device busy.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from app.backends import Outputs, Pixels
from app.errors import BackendError, DeadlinePassed, EngineStalled, InferenceFailed, ServiceError, ShuttingDown
from app.observability.logs import with_fields
from app.observability.record import ImageResult
from app.serving.entry import Batch, Entry, Outcomes
from app.serving.scheduler import Decision, Scheduler, SchedulerLimits
from app.store.catalogue import ServedVariant
from app.store.outputs import GMACS, TOKENS

logger = logging.getLogger(__name__)

Deliver = Callable[[Outcomes], None]
Observe = Callable[[Batch, float], None]


class Engine:
    """Delivers exactly one outcome per submitted entry, unless it is withdrawn first.

    deliver: called by a worker, or by the thread of `stop` or `abandon`, with no lock held.
    observe: called with each finished batch and its run time in seconds.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        deliver: Deliver,
        observe: Observe = lambda batch, seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limits, self._deliver, self._observe, self.clock = limits, deliver, observe, clock
        self._scheduler = Scheduler(limits)
        self._owed: set[Entry] = set()
        # Guards the scheduler and the entries that are owed an outcome.
        self._changed = threading.Condition()
        self._is_stopping = False
        self._busy_since: dict[threading.Thread, float] = {}
        self._workers = [
            threading.Thread(target=self._serve, name=f"engine-{i}", daemon=True)
            for i in range(limits.max_concurrent_batches)
        ]

    def __repr__(self) -> str:
        return f"<Engine {self._scheduler} alive={self._is_alive} stopping={self._is_stopping}>"

    @property
    def _is_alive(self) -> bool:
        return all(worker.is_alive() for worker in self._workers)

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def stop(self, timeout_seconds: float) -> None:
        """Refuse queued entries and finish the running batches; after the timeout, refuse these too."""
        with self._changed:
            self._is_stopping = True
            waiting = self._scheduler.withdraw(list(self._scheduler.waiting))
            self._changed.notify_all()
        refusal = ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        self._deliver_owed([(entry, refusal) for entry in waiting])
        until = time.monotonic() + timeout_seconds
        for worker in self._workers:
            if worker.is_alive():
                worker.join(max(0.0, until - time.monotonic()))
        self.abandon(refusal)

    def abandon(self, reason: ServiceError) -> int:
        """Fail every entry in flight, because a worker hangs or died. Returns their number."""
        with self._changed:
            self._scheduler.waiting.clear()
            owed = list(self._owed)
        self._deliver_owed([(entry, reason) for entry in owed])
        return len(owed)

    def is_responsive(self, stall_seconds: float) -> bool:
        """Return whether every worker is alive and no batch has run longer than this."""
        now = self.clock()
        return self._is_alive and all(now - since < stall_seconds for since in list(self._busy_since.values()))

    def has_ended(self) -> bool:
        """Return whether all workers have ended."""
        return not any(worker.is_alive() for worker in self._workers)

    def require_room(self, entries: Sequence[Entry]) -> None:
        """Check whether `submit` would succeed now. Raises: QueueFull, DeadlineUnmeetable."""
        with self._changed:
            self._scheduler.require_room(entries, self.clock())

    def submit(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of a request, or none.

        Raises: QueueFull, DeadlineUnmeetable, ShuttingDown, EngineStalled.
        """
        with self._changed:
            if self._is_stopping:
                raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
            if not self._is_alive:
                raise EngineStalled("The engine has stopped.", retry_after_seconds=1)
            now = self.clock()
            self._scheduler.submit(entries, now)
            self._owed.update(entries)
            self._changed.notify()

    def withdraw(self, entries: Iterable[Entry]) -> int:
        """Drop the entries of a cancelled request. Returns how many of them were still queued."""
        with self._changed:
            leaving = list(entries)
            self._owed.difference_update(leaving)
            return len(self._scheduler.withdraw(leaving))

    def expected_seconds(self, variant: ServedVariant, n_images: int) -> float:
        """Estimate the run time of a batch at the current speed, without concurrent batches."""
        return self._scheduler.seconds(variant, n_images)

    def seconds_until_drained(self) -> int:
        """Estimate when the current work will be done, for Retry-After. Units: whole seconds, at least 1."""
        with self._changed:
            return self._scheduler.seconds_until_drained(self.clock())

    def depths_by_label(self) -> Mapping[tuple[str, str, str], int]:
        """Count queued images by model, policy and preferred rate."""
        with self._changed:
            return self._scheduler.depths_by_label()

    def floors(self) -> dict[tuple[str, str, str], int]:
        """Return the raised rate floors by family: the minimum rate of requests that opted in."""
        with self._changed:
            return {family: floor.r for family, floor in self._scheduler.rate_floors.items()}

    def _serve(self) -> None:
        try:
            finished: Outcomes | None = []
            while finished is not None:
                finished = self._step(finished)
        except BaseException:
            logger.exception("the engine has stopped")
            self.abandon(InferenceFailed())

    def _step(self, finished: Outcomes) -> Outcomes | None:
        """Deliver the last batch and run the next one. Returns its outcomes; None when it is time to stop.

        Stack the next batch before delivering the last one: delivery wakes threads that compete for the GIL, and the
        device would idle. Keep no local between steps: it could keep a dropped version in memory.
        """
        decision = self._next_decision(may_wait=not finished)
        batch = None if decision is None else decision.batch
        pixels = None if batch is None else self._stack(batch.entries)
        error = DeadlinePassed("The deadline has passed or cannot be met.")
        expired = () if decision is None else decision.expired
        self._deliver_owed([*finished, *((entry, error) for entry in expired)])
        if decision is None:
            return None
        return [] if batch is None or pixels is None else self._run(batch, pixels)

    def _next_decision(self, *, may_wait: bool) -> Decision | None:
        """Return the next decision; wait for work if `may_wait`. None when it is time to stop."""
        with self._changed:
            while not self._is_stopping:
                decision = self._scheduler.decide(self.clock())
                if decision.expired or decision.batch is not None or not may_wait:
                    self._wake_another_worker()
                    return decision
                wake_at = decision.wake_at
                self._changed.wait(None if wake_at is None else max(0.0, wake_at - self.clock()))
            return None

    def _run(self, batch: Batch, pixels: Pixels) -> Outcomes:
        failures: list[Entry] = []
        outcomes = self._infer(batch, list(batch.entries), pixels, failures)
        ended_at = self.clock()
        with self._changed:
            self._scheduler.finish(batch, ended_at, is_measured=not failures)
            self._wake_another_worker()
        seconds = ended_at - batch.started_at
        if len(batch.entries) == 1 and not failures:
            batch.variant.latency.add(seconds)
        self._observe(batch, seconds)
        return outcomes

    def _wake_another_worker(self) -> None:
        """Wake another worker: more batches may be ready, or one was deferred to protect this run's deadline."""
        if self._scheduler.waiting:
            self._changed.notify()

    def _infer(self, batch: Batch, entries: list[Entry], pixels: Pixels, failures: list[Entry]) -> Outcomes:
        """Run entries together. If that fails, retry in halves, so that only the faulty entries fail."""
        worker = threading.current_thread()
        self._busy_since[worker] = self.clock()
        try:
            outputs = _run_checked(batch.variant, pixels, len(entries))
        except Exception:
            if len(entries) == 1:
                logger.exception(
                    "inference failed: %s",
                    batch.variant.spec.id,
                    extra=with_fields(request_ids=[entry.request_id for entry in entries]),
                )
                failures.extend(entries)
                return [(entries[0], InferenceFailed())]
            logger.warning("batch failed, retrying in halves: %d images", len(entries))
        else:
            seconds = self.clock() - batch.started_at
            return [
                (entry, _make_result(batch, entry, outputs, i, len(entries), seconds))
                for i, entry in enumerate(entries)
            ]
        finally:
            self._busy_since.pop(worker, None)
        half = len(entries) // 2
        return [
            outcome
            for part in (entries[:half], entries[half:])
            for outcome in self._infer(batch, part, self._stack(part), failures)
        ]

    def _stack(self, entries: Sequence[Entry]) -> Pixels:
        """Stack images into a batch, padded with black images if batches are padded."""
        images = [entry.pixels for entry in entries]
        size = self._limits.run_size(len(images))
        return np.stack(images + [np.zeros_like(images[0])] * (size - len(images)))

    def _deliver_owed(self, outcomes: Outcomes) -> None:
        """Deliver the outcomes of entries that are still owed one."""
        with self._changed:
            due = [(entry, outcome) for entry, outcome in outcomes if entry in self._owed]
            self._owed.difference_update(entry for entry, _ in due)
        if due:
            self._deliver(due)


def _run_checked(variant: ServedVariant, pixels: Pixels, n_images: int) -> Outputs:
    """Run a batch and check the outputs. Raises: BackendError, also for missing rows and non-finite values."""
    outputs = variant.runner.run(pixels)
    if any(len(array) != len(pixels) or not np.isfinite(array[:n_images]).all() for array in outputs.values()):
        shapes = {role: array.shape for role, array in outputs.items()}
        raise BackendError(f"the graph returned non-finite values or too few rows: {shapes}")
    return outputs


def _make_result(batch: Batch, entry: Entry, outputs: Outputs, place: int, size: int, seconds: float) -> ImageResult:
    """Make the result of one image of a batch. Graphs with fixed token counts do not return tokens or GMACs."""
    spec, rows = batch.variant.spec, {role: array[place] for role, array in outputs.items()}
    return ImageResult(
        model=entry.family[0],
        variant=batch.variant,
        outputs=rows,
        tokens=rows[TOKENS].tolist() if TOKENS in rows else list(spec.tokens),
        gmacs=float(rows[GMACS]) if GMACS in rows else spec.gmacs,
        batch_size=size,
        started_at=batch.started_at,
        decode_seconds=entry.decode_seconds,
        decode_wait_seconds=entry.decode_wait_seconds,
        queue_seconds=batch.started_at - entry.submitted_at,
        inference_seconds=seconds,
        is_degraded=batch.variant is not entry.ladder[0],
    )
