"""A simulated device on a virtual clock, driven by the real scheduler, without threads or graphs."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.backends import Outputs, Pixels
from app.errors import ServiceError
from app.serving.entry import Batch, Entry
from app.serving.scheduler import Scheduler, SchedulerLimits
from app.store.catalogue import ServedVariant
from app.store.costs import CostTable
from app.store.manifest import Variant
from tests.app.tiny_store import make_variant

FAMILY = ("tiny", "1", "tome")
NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


class NoRunner:
    def run(self, pixels: Pixels) -> Outputs:
        raise AssertionError("this runner must not run")


def make_served(r: int, seconds: dict[int, float], top1: float = 0.9) -> ServedVariant:
    """Make a variant with the given expected run times by batch size."""
    accuracy: dict[str, Any] = {"dataset": "tiny", "split": "test", "n_images": 100, "date": "2026-11-20"}
    written = {**make_variant("tome", 0, "onnx"), "r": r, "id": f"tome-r{r}", "gmacs": 10 - r / 10}
    written["accuracy"] = {**accuracy, "top1": top1, "ci95": [top1, top1]}
    return ServedVariant(Variant.model_validate(written, strict=False), NoRunner(), costs=CostTable(seconds))


@dataclass(order=True)
class Event:
    time: float
    serial: int
    act: Callable[[], None] = field(compare=False)


class Simulation:
    """Records one outcome per entry: "done", "late", "expired", "refused" or "withdrawn".

    true_seconds: actual run time of n images of a variant on an idle device; concurrent runs share the device.
    """

    def __init__(self, limits: SchedulerLimits, true_seconds: Callable[[ServedVariant, int], float]) -> None:
        self.scheduler, self._true_seconds = Scheduler(limits), true_seconds
        self.now = 0.0
        self.outcomes: dict[Entry, str] = {}
        self.ran_as: dict[Entry, ServedVariant] = {}
        self.finished_at: dict[Entry, float] = {}
        self.batches: list[Batch] = []
        # Running batches, and the device time that each still needs.
        self._running: list[tuple[Batch, float]] = []
        self._events: list[Event] = []
        self._serials = itertools.count()

    def at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, Event(time, next(self._serials), act))

    def submit_at(self, time: float, make_entries: Callable[[float], Sequence[Entry]]) -> None:
        def act() -> None:
            entries = make_entries(time)
            try:
                self.scheduler.submit(entries, self.now)
            except ServiceError:
                self._record(entries, "refused")
            else:
                self._start_batches()

        self.at(time, act)

    def withdraw_at(self, time: float, entries: Sequence[Entry]) -> None:
        self.at(time, lambda: self._record(self.scheduler.withdraw(entries), "withdrawn"))

    def run(self) -> None:
        """Advance the clock until no event or batch is left."""
        while self._events or self._running:
            ends_at, batch = self._next_end()
            if self._events and self._events[0].time <= ends_at:
                event = heapq.heappop(self._events)
                self._advance(max(self.now, event.time))
                event.act()
            elif batch is not None:
                self._advance(ends_at)
                self._finish(batch)

    def _next_end(self) -> tuple[float, Batch | None]:
        if not self._running:
            return math.inf, None
        batch, seconds = min(self._running, key=lambda item: item[1])
        return self.now + seconds * len(self._running), batch

    def _advance(self, now: float) -> None:
        part = (now - self.now) / max(1, len(self._running))
        self._running = [(batch, max(0.0, seconds - part)) for batch, seconds in self._running]
        self.now = now

    def _start_batches(self) -> None:
        """Do what the free workers do, until one has nothing to start."""
        while len(self._running) < self.scheduler.limits.max_concurrent_batches:
            decision = self.scheduler.decide(self.now)
            self._record(decision.expired, "expired")
            if decision.batch is None:
                if decision.wake_at is not None:
                    self.at(decision.wake_at, self._start_batches)
                return
            self.batches.append(decision.batch)
            self._running.append(
                (decision.batch, self._true_seconds(decision.batch.variant, len(decision.batch.entries)))
            )

    def _finish(self, batch: Batch) -> None:
        self._running = [(other, seconds) for other, seconds in self._running if other is not batch]
        self.scheduler.finish(batch, self.now)
        for entry in batch.entries:
            self.ran_as[entry], self.finished_at[entry] = batch.variant, self.now
            in_time = entry.deadline is None or self.now <= entry.deadline
            self._record([entry], "done" if in_time else "late")
        self._start_batches()

    def _record(self, entries: Iterable[Entry], outcome: str) -> None:
        for entry in entries:
            assert entry not in self.outcomes, f"{self.outcomes[entry]} and then {outcome}"
            self.outcomes[entry] = outcome
