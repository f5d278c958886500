"""A device and its callers on a virtual clock, around the real scheduler: a thread and a graph, without either."""

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
        raise AssertionError("nothing runs in a simulation")


def make_served(r: int, seconds: dict[int, float], top1: float = 0.9) -> ServedVariant:
    """Make a variant whose runs are expected to take so long, by batch size."""
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
    """What became of each entry: "done", "late", "expired", "refused" or "withdrawn"; only ever one of them.

    true_seconds: what a run of n images of a variant really takes, by itself; runs that overlap share the device.
    """

    def __init__(self, limits: SchedulerLimits, true_seconds: Callable[[ServedVariant, int], float]) -> None:
        self.scheduler, self._true_seconds = Scheduler(limits), true_seconds
        self.now = 0.0
        self.fates: dict[Entry, str] = {}
        self.ran_as: dict[Entry, ServedVariant] = {}
        self.finished_at: dict[Entry, float] = {}
        self.batches: list[Batch] = []
        self._left: list[tuple[Batch, float]] = []  # what runs, and the seconds that it still needs by itself
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
                self._settle(entries, "refused")
            else:
                self._turn()

        self.at(time, act)

    def withdraw_at(self, time: float, entries: Sequence[Entry]) -> None:
        self.at(time, lambda: self._settle(self.scheduler.withdraw(entries), "withdrawn"))

    def run(self) -> None:
        """Let time pass until nothing is left to happen."""
        while self._events or self._left:
            ends_at, batch = self._next_end()
            if self._events and self._events[0].time <= ends_at:
                event = heapq.heappop(self._events)
                self._advance(max(self.now, event.time))
                event.act()
            elif batch is not None:
                self._advance(ends_at)
                self._finish(batch)

    def _next_end(self) -> tuple[float, Batch | None]:
        if not self._left:
            return math.inf, None
        batch, seconds = min(self._left, key=lambda item: item[1])
        return self.now + seconds * len(self._left), batch

    def _advance(self, now: float) -> None:
        part = (now - self.now) / max(1, len(self._left))
        self._left = [(batch, max(0.0, seconds - part)) for batch, seconds in self._left]
        self.now = now

    def _turn(self) -> None:
        """Do what the free lanes do, until one finds nothing to begin."""
        while len(self._left) < self.scheduler.limits.max_concurrent_batches:
            decision = self.scheduler.decide(self.now)
            self._settle(decision.expired, "expired")
            if decision.batch is None:
                if decision.wake_at is not None:
                    self.at(decision.wake_at, self._turn)
                return
            self.batches.append(decision.batch)
            self._left.append((decision.batch, self._true_seconds(decision.batch.variant, len(decision.batch.entries))))

    def _finish(self, batch: Batch) -> None:
        self._left = [(other, seconds) for other, seconds in self._left if other is not batch]
        self.scheduler.finish(batch, self.now)
        for entry in batch.entries:
            self.ran_as[entry], self.finished_at[entry] = batch.variant, self.now
            in_time = entry.deadline is None or self.now <= entry.deadline
            self._settle([entry], "done" if in_time else "late")
        self._turn()

    def _settle(self, entries: Iterable[Entry], fate: str) -> None:
        for entry in entries:
            assert entry not in self.fates, f"{self.fates[entry]} and then {fate}"
            self.fates[entry] = fate
