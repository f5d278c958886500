"""Engine: one scheduler for one device, and a thread for each lane of it: it asks what is next, runs it, and answers
each entry once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from app.backends import Answer, Pixels
from app.catalogue import ServedVariant
from app.errors import BackendError, DeadlinePassed, EngineStalled, InferenceFailed, ServiceError, ShuttingDown
from app.logs import with_fields
from app.serving.entry import Batch, Done, Entry
from app.serving.scheduler import Limits, Scheduler, Turn

logger = logging.getLogger(__name__)

Outcome = Done | ServiceError
Outcomes = Sequence[tuple[Entry, Outcome]]
Deliver = Callable[[Outcomes], None]
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
        self._busy_since: dict[threading.Thread, float] = {}
        self._lanes = [
            threading.Thread(target=self._serve, name=f"engine-{i}", daemon=True) for i in range(limits.n_lanes)
        ]

    def __repr__(self) -> str:
        return f"<Engine {self._scheduler} alive={self._is_alive} stopping={self._is_stopping}>"

    @property
    def _is_alive(self) -> bool:
        return all(lane.is_alive() for lane in self._lanes)

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def stop(self, timeout_seconds: float) -> None:
        """Finish what runs, refuse what waits; what still runs after the timeout is refused too."""
        with self._changed:
            self._is_stopping = True
            waiting = self._scheduler.withdraw(list(self._scheduler.waiting))
            self._changed.notify_all()
        refusal = ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        self._answer([(entry, refusal) for entry in waiting])
        until = time.monotonic() + timeout_seconds
        for lane in self._lanes:
            if lane.is_alive():
                lane.join(max(0.0, until - time.monotonic()))
        self.abandon(refusal)

    def abandon(self, reason: ServiceError) -> int:
        """Give all that is inside this answer, because the thread hangs or is dead. Returns how many there were."""
        with self._changed:
            self._scheduler.waiting.clear()
            owed = list(self._owed)
        self._answer([(entry, reason) for entry in owed])
        return len(owed)

    def is_responsive(self, stall_seconds: float) -> bool:
        """Tell whether every thread lives and no run has lasted too long."""
        now = self.clock()
        return self._is_alive and all(now - since < stall_seconds for since in list(self._busy_since.values()))

    def has_ended(self) -> bool:
        """Tell whether no thread is left, not even one that hangs."""
        return not any(lane.is_alive() for lane in self._lanes)

    def require_room(self, entries: Sequence[Entry]) -> None:
        """Raises: QueueFull, DeadlineUnmeetable; what `submit` would raise now."""
        with self._changed:
            self._scheduler.require_room(entries, self.clock())

    def submit(self, entries: Sequence[Entry]) -> None:
        """Queue the entries of one request, all or none.

        Raises: QueueFull, DeadlineUnmeetable, ShuttingDown, EngineStalled.
        """
        with self._changed:
            if self._is_stopping:
                raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
            if not self._is_alive:
                raise EngineStalled("The engine has ended.", retry_after_seconds=1)
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
        """Expect what a run of some images takes now, by itself."""
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
            finished: Outcomes | None = []
            while finished is not None:
                finished = self._serve_turn(finished)
        except BaseException:
            logger.exception("the engine has stopped")
            self.abandon(InferenceFailed())

    def _serve_turn(self, finished: Outcomes) -> Outcomes | None:
        """Answer what has run, and run what is next; in between nothing is kept, lest a dropped version stay in memory.

        The next batch is ready before the last one's callers are answered: all of them would want the interpreter at
        once, and the device would stand still meanwhile.
        """
        turn = self._next_turn(may_wait=not finished)
        pixels = None if turn is None or turn.batch is None else self._stack(turn.batch.entries)
        lost = DeadlinePassed("The deadline is past, or no run would end before it.")
        self._answer([*finished, *((entry, lost) for entry in (() if turn is None else turn.expired))])
        if turn is None:
            return None
        return [] if turn.batch is None or pixels is None else self._run(turn.batch, pixels)

    def _next_turn(self, *, may_wait: bool) -> Turn | None:
        """Return what to do now, or if there is nothing once there is; None when it is time to stop."""
        with self._changed:
            while not self._is_stopping:
                turn = self._scheduler.take(self.clock())
                if turn.expired or turn.batch is not None or not may_wait:
                    self._wake_another_lane()
                    return turn
                self._changed.wait(None if turn.wake_at is None else max(0.0, turn.wake_at - self.clock()))
            return None

    def _run(self, batch: Batch, pixels: Pixels) -> Outcomes:
        failures: list[Entry] = []
        outcomes = self._infer(batch, list(batch.entries), pixels, failures)
        ended_at = self.clock()
        with self._changed:
            self._scheduler.finish(batch, ended_at, is_measured=not failures)
            self._wake_another_lane()
        seconds = ended_at - batch.started_at
        if len(batch.entries) == 1 and not failures:
            batch.variant.latency.add(seconds)
        self._observe(batch, seconds)
        return outcomes

    def _wake_another_lane(self) -> None:
        """For more than one lane takes, or because one has held back lest this one's deadline be missed."""
        if self._scheduler.waiting:
            self._changed.notify()

    def _infer(self, batch: Batch, entries: list[Entry], pixels: Pixels, failures: list[Entry]) -> Outcomes:
        """Run entries together; if that fails, in halves, until only the culprits fail."""
        lane = threading.current_thread()
        self._busy_since[lane] = self.clock()
        try:
            answer = _run_checked(batch.variant, pixels, len(entries))
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
        else:
            seconds = self.clock() - batch.started_at
            return [(entry, _done(batch, entry, answer, i, len(entries), seconds)) for i, entry in enumerate(entries)]
        finally:
            self._busy_since.pop(lane, None)
        half = len(entries) // 2
        return [
            outcome
            for part in (entries[:half], entries[half:])
            for outcome in self._infer(batch, part, self._stack(part), failures)
        ]

    def _stack(self, entries: Sequence[Entry]) -> Pixels:
        """Lay images into one batch, filled up with black ones where the device wants that."""
        images = [entry.pixels for entry in entries]
        size = self._limits.run_size(len(images))
        return np.stack(images + [np.zeros_like(images[0])] * (size - len(images)))

    def _answer(self, outcomes: Outcomes) -> None:
        """Deliver to those who are still owed an answer."""
        with self._changed:
            due = [(entry, outcome) for entry, outcome in outcomes if entry in self._owed]
            self._owed.difference_update(entry for entry, _ in due)
        if due:
            self._deliver(due)


def _run_checked(variant: ServedVariant, pixels: Pixels, n_images: int) -> Answer:
    """Raises: BackendError, also for answers that are too few or not finite."""
    answer = variant.runner.run(pixels)
    arrays = [array for array in (answer.logits, answer.tokens, answer.gmacs) if array is not None]
    if any(len(array) != len(pixels) or not np.isfinite(array[:n_images]).all() for array in arrays):
        raise BackendError(f"the graph answered {[array.shape for array in arrays]}, or not finite numbers")
    return answer


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
