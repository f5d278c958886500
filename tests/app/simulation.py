"""A device and its callers on a virtual clock, around the real scheduler: a thread and a graph, without either."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.backends import Answer, Pixels
from app.catalogue import ServedVariant
from app.errors import ServiceError
from app.manifest import Variant
from app.serving.costs import CostTable
from app.serving.entry import Batch, Entry
from app.serving.scheduler import Limits, Scheduler
from tests.app.tiny_store import make_variant

FAMILY = ("tiny", "1", "tome")
NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


class NoRunner:
    def run(self, pixels: Pixels) -> Answer:
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
    """What became of each entry: "done", "late", "expired", "refused", "withdrawn" or "failed"; only ever one of them.

    true_seconds: what a run of n images of a variant really takes.
    """

    def __init__(self, limits: Limits, true_seconds: Callable[[ServedVariant, int], float]) -> None:
        self.scheduler, self._true_seconds = Scheduler(limits), true_seconds
        self.now = 0.0
        self.fates: dict[Entry, str] = {}
        self.ran_as: dict[Entry, ServedVariant] = {}
        self.finished_at: dict[Entry, float] = {}
        self.batches: list[Batch] = []
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
        while self._events:
            event = heapq.heappop(self._events)
            self.now = max(self.now, event.time)
            event.act()

    def _turn(self) -> None:
        if self.scheduler.running is not None:
            return
        turn = self.scheduler.take(self.now)
        self._settle(turn.expired, "expired")
        if turn.batch is not None:
            batch = turn.batch
            self.batches.append(batch)
            seconds = self._true_seconds(batch.variant, len(batch.entries))
            self.at(self.now + seconds, lambda: self._finish(batch))
        elif turn.wake_at is not None:
            self.at(turn.wake_at, self._turn)

    def _finish(self, batch: Batch) -> None:
        self.scheduler.finish(self.now)
        for entry in batch.entries:
            self.ran_as[entry], self.finished_at[entry] = batch.variant, self.now
            in_time = entry.deadline is None or self.now <= entry.deadline
            self._settle([entry], "done" if in_time else "late")
        self._turn()

    def _settle(self, entries: Iterable[Entry], fate: str) -> None:
        for entry in entries:
            assert entry not in self.fates, f"{self.fates[entry]} and then {fate}"
            self.fates[entry] = fate
