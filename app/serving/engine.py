"""Engine: one thread for one device. It asks the scheduler what is next, runs it, and answers each entry once."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from app.backends import Answer, Pixels
from app.catalogue import ServedVariant
from app.errors import BackendError, DeadlinePassed, InferenceFailed, NotReady, ServiceError, ShuttingDown
from app.logs import with_fields
from app.serving.entry import Batch, Done, Entry
from app.serving.scheduler import Limits, Scheduler, Turn

logger = logging.getLogger(__name__)

Outcome = Done | ServiceError
Deliver = Callable[[Sequence[tuple[Entry, Outcome]]], None]
Observe = Callable[[Batch, float], None]


class Engine:
    """Every entry that was taken is delivered exactly once, whatever happens, unless it is withdrawn before.

    deliver: is called in the engine's thread, or in that of `stop` and `abandon`, without a lock held.
    observe: is told of each batch that has run, and of the seconds it took.
    """

    def __init__(
        self,
        limits: Limits,
        deliver: Deliver,
        observe: Observe = lambda batch, seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limits, self._deliver, self._observe, self.clock = limits, deliver, observe, clock
        self._scheduler = Scheduler(limits)
        self._owed: set[Entry] = set()
        self._changed = threading.Condition()  # guards the scheduler and what is owed
        self._is_stopping = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def __repr__(self) -> str:
        return f"<Engine {self._scheduler} alive={self._thread.is_alive()} stopping={self._is_stopping}>"

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Finish what runs, refuse what waits; what still runs after the timeout is refused too."""
        with self._changed:
            self._is_stopping = True
            waiting = self._scheduler.withdraw(list(self._scheduler.waiting))
            self._changed.notify()
        refusal = ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        self._answer([(entry, refusal) for entry in waiting])
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        self.abandon(refusal)

    def abandon(self, reason: ServiceError) -> int:
        """Give all that is inside this answer, because the thread hangs or is dead. Returns how many there were."""
        with self._changed:
            self._scheduler.waiting.clear()
            owed = list(self._owed)
        self._answer([(entry, reason) for entry in owed])
        return len(owed)

    def is_responsive(self, stall_seconds: float) -> bool:
        """Tell whether the thread lives and the present run has not lasted too long."""
        busy_since = self._busy_since
        return self._thread.is_alive() and (busy_since is None or self.clock() - busy_since < stall_seconds)

    def require_room(self, entries: Sequence[Entry]) -> None:
        """Raises: QueueFull, DeadlineUnmeetable; what `submit` would raise now."""
        with self._changed:
            self._scheduler.require_room(entries, self.clock())

    def submit(self, entries: Sequence[Entry]) -> None:
        """Queue the entries of one request, all or none.

        Raises: QueueFull, DeadlineUnmeetable, ShuttingDown, NotReady.
        """
        with self._changed:
            if self._is_stopping:
                raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
            if not self._thread.is_alive():
                raise NotReady("The engine does not answer.", retry_after_seconds=1)
            now = self.clock()
            self._scheduler.submit(entries, now)
            self._owed.update(entries)
            self._changed.notify()

    def withdraw(self, entries: Iterable[Entry]) -> int:
        """Forget entries whose caller has left; they are not delivered. Returns how many were still waiting."""
        with self._changed:
            leaving = list(entries)
            self._owed.difference_update(leaving)
            return len(self._scheduler.withdraw(leaving))

    def expected_seconds(self, variant: ServedVariant, n_images: int) -> float:
        """Expect what a run of some images takes now."""
        return self._scheduler.seconds(variant, n_images)

    def seconds_until_drained(self) -> int:
        """Expect how long what is inside takes, in whole seconds, at least 1: for Retry-After."""
        with self._changed:
            return self._scheduler.seconds_until_drained(self.clock())

    def depths_by_label(self) -> Mapping[tuple[str, str, str], int]:
        """Count the images that wait, by model, policy and the rate that they prefer."""
        with self._changed:
            return self._scheduler.depths_by_label()

    def floors(self) -> dict[tuple[str, str, str], int]:
        """Return the least rate at which those who consent run now, of each family under load."""
        with self._changed:
            return {family: level.floor for family, level in self._scheduler.levels.items()}

    def _serve(self) -> None:
        try:
            while (turn := self._wait_for_turn()) is not None:
                lost = DeadlinePassed("The deadline is past, or no run would end before it.")
                self._answer([(entry, lost) for entry in turn.expired])
                if turn.batch is not None:
                    self._run(turn.batch)
        except BaseException:
            logger.exception("the engine has stopped")
            self.abandon(InferenceFailed())

    def _wait_for_turn(self) -> Turn | None:
        """Return what to do, once there is something; None when it is time to stop."""
        with self._changed:
            while not self._is_stopping:
                turn = self._scheduler.take(self.clock())
                if turn.expired or turn.batch is not None:
                    return turn
                self._changed.wait(None if turn.wake_at is None else max(0.0, turn.wake_at - self.clock()))
            return None

    def _run(self, batch: Batch) -> None:
        failures: list[Entry] = []
        outcomes = self._infer(batch, list(batch.entries), failures)
        ended_at = self.clock()
        with self._changed:
            self._scheduler.finish(ended_at, is_measured=not failures)
        seconds = ended_at - batch.started_at
        if len(batch.entries) == 1 and not failures:
            batch.variant.latency.add(seconds)
        self._observe(batch, seconds)
        self._answer(outcomes)

    def _infer(self, batch: Batch, entries: list[Entry], failures: list[Entry]) -> list[tuple[Entry, Outcome]]:
        """Run entries together; if that fails, in halves, until only the culprits fail."""
        self._busy_since = self.clock()
        try:
            answer = self._run_checked(batch.variant, entries)
        except Exception:
            if len(entries) == 1:
                logger.exception(
                    "inference failed: %s",
                    batch.variant.entry.id,
                    extra=with_fields(request_ids=[entry.request_id for entry in entries]),
                )
                failures.extend(entries)
                return [(entries[0], InferenceFailed())]
            logger.warning("a run of %d images failed, they run again in halves", len(entries))
            half = len(entries) // 2
            return self._infer(batch, entries[:half], failures) + self._infer(batch, entries[half:], failures)
        finally:
            self._busy_since = None
        seconds = self.clock() - batch.started_at
        return [(entry, _done(batch, entry, answer, i, len(entries), seconds)) for i, entry in enumerate(entries)]

    def _run_checked(self, variant: ServedVariant, entries: Sequence[Entry]) -> Answer:
        n = len(entries)
        pixels = _stack([entry.pixels for entry in entries], self._limits.run_size(n))
        answer = variant.runner.run(pixels)
        arrays = [array for array in (answer.logits, answer.tokens, answer.gmacs) if array is not None]
        if any(len(array) != len(pixels) or not np.isfinite(array[:n]).all() for array in arrays):
            raise BackendError(f"the graph answered {[array.shape for array in arrays]}, or not finite numbers")
        return answer

    def _answer(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        """Deliver to those who are still owed an answer."""
        with self._changed:
            due = [(entry, outcome) for entry, outcome in outcomes if entry in self._owed]
            self._owed.difference_update(entry for entry, _ in due)
        if due:
            self._deliver(due)


def _stack(images: Sequence[Pixels], size: int) -> Pixels:
    """Lay images into one batch, filled up with black ones. Shapes: (H, W, 3) each -> (size, H, W, 3)."""
    if len(images) == size:
        return np.stack(images)
    batch = np.zeros((size, *images[0].shape), np.uint8)
    np.stack(images, out=batch[: len(images)])
    return batch


def _done(batch: Batch, entry: Entry, answer: Answer, place: int, size: int, seconds: float) -> Done:
    return Done(
        variant=batch.variant,
        is_degraded=batch.variant is not entry.ladder[0],
        logits=answer.logits[place],
        tokens=None if answer.tokens is None else answer.tokens[place].tolist(),
        gmacs=None if answer.gmacs is None else float(answer.gmacs[place]),
        batch_size=size,
        started_at=batch.started_at,
        queue_seconds=batch.started_at - entry.submitted_at,
        inference_seconds=seconds,
    )
