"""Scheduler: the queue and the running batches of one device, by the rules in `planning`. Has no thread or clock."""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.errors import DeadlineUnmeetable, QueueFull, ServiceError
from app.serving import planning
from app.serving.entry import Batch, Entry, Family
from app.serving.planning import RateFloor
from app.store.catalogue import Labels, ServedVariant
from app.store.costs import Pace, batch_buckets

MAX_RETRY_SECONDS = 600


@dataclass(frozen=True)
class SchedulerLimits:
    """max_concurrent_batches: batches that share the device.

    max_delay_seconds: maximum wait of an incomplete batch for more entries, from its first one.
    is_padded: whether batches are padded to a few sizes, because the device plans for each size.
    """

    max_queue_images: int
    max_batch_images: int
    max_concurrent_batches: int = 1
    max_delay_seconds: float = 0.0
    is_padded: bool = False

    def run_size(self, n_images: int) -> int:
        """Return the size of a batch after padding."""
        if not self.is_padded:
            return n_images
        return next((size for size in batch_buckets(self.max_batch_images) if size >= n_images), n_images)


@dataclass
class Running:
    """A batch on the device, and the device time it has used. Units: seconds."""

    batch: Batch
    expected_seconds: float
    seconds: float = 0.0

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self.expected_seconds - self.seconds)


@dataclass(frozen=True)
class Decision:
    """What a free worker does: refuse the expired entries, then run the batch or wait. Units: seconds.

    wake_at: when to decide again at the latest; None to wait for the next entry.
    """

    expired: Sequence[Entry] = ()
    batch: Batch | None = None
    wake_at: float | None = None


@dataclass
class Scheduler:
    """An entry is queued, then runs in a batch; or it leaves the queue, expired or withdrawn.

    Concurrent batches share the device equally. The cost of a batch is its share of the device time, so that costs add
    up. `waiting` is sorted by due time.
    """

    limits: SchedulerLimits
    waiting: list[Entry] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    rate_floors: dict[Family, RateFloor] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    refused_at: dict[Family, float] = field(default_factory=dict)
    _advanced_to: float = 0.0
    _idle_since: float = 0.0

    def __repr__(self) -> str:
        running = [len(run.batch.entries) for run in self.running]
        return f"<Scheduler waiting={len(self.waiting)} running={running} floors={self.rate_floors}>"

    def seconds(self, variant: ServedVariant, n_images: int) -> float:
        """Estimate the run time of a batch at the current speed, without concurrent batches."""
        return variant.costs.seconds(self.limits.run_size(n_images)) * self.pace.factor

    def depths_by_label(self) -> Counter[Labels]:
        """Count queued entries by model, policy and preferred rate."""
        return Counter((entry.family[0], entry.family[2], entry.ladder[0].rate_label) for entry in self.waiting)

    def require_room(self, entries: Sequence[Entry], now: float) -> None:
        """Check that the queue has room, and time, for these entries.

        Raises: QueueFull, DeadlineUnmeetable, with the seconds until a retry is worthwhile.
        """
        try:
            self._require_room(entries, now)
        except ServiceError:
            costs = self._costs()
            # Entries that even an idle device could not serve in time say nothing about the load.
            by_load = [entry for entry in entries if not planning.is_expired(entry, now, costs)]
            self.refused_at.update((entry.family, now) for entry in by_load)
            raise

    def _require_room(self, entries: Sequence[Entry], now: float) -> None:
        for variant, n_new in Counter(entry.ladder[0] for entry in entries).items():
            n_waiting = sum(entry.ladder[0] is variant for entry in self.waiting)
            if n_waiting + n_new > self.limits.max_queue_images:
                detail = (
                    f"{n_waiting} images are queued for {variant.spec.id}; the limit is {self.limits.max_queue_images}."
                )
                raise QueueFull(detail, retry_after_seconds=self.seconds_until_drained(now))
        size, n_concurrent = self.limits.max_batch_images, self.limits.max_concurrent_batches
        costs = self._costs(planning.SAFETY_FACTOR)
        late = planning.lateness(self.waiting, entries, self._free_at(now), costs, size, n_concurrent)
        if late > 0:
            detail = f"At the current load, the response would be {math.ceil(late * 1e3)} ms late."
            raise DeadlineUnmeetable(detail, retry_after_seconds=_whole_seconds(late))

    def submit(self, entries: Sequence[Entry], now: float) -> None:
        """Queue all entries of a request, or none.

        Raises: QueueFull, DeadlineUnmeetable.
        """
        self.require_room(entries, now)
        for entry in entries:
            insort(self.waiting, entry, key=lambda item: item.order)

    def withdraw(self, entries: Iterable[Entry]) -> list[Entry]:
        """Remove entries from the queue. Returns those that were still in it."""
        leaving = set(entries)
        found = [entry for entry in self.waiting if entry in leaving]
        self._remove(leaving)
        return found

    def _remove(self, entries: set[Entry]) -> None:
        if entries:
            self.waiting = [entry for entry in self.waiting if entry not in entries]

    def decide(self, now: float) -> Decision:
        """Decide what a free worker does next."""
        self._advance(now)
        costs = self._costs_of_concurrent()
        expired = [entry for entry in self.waiting if planning.is_expired(entry, now, costs)]
        self._remove(set(expired))
        if not self.waiting or not self._may_run_another(now):
            return Decision(expired)
        self._set_floors(now)
        floors, max_batch = self._floors(), self.limits.max_batch_images

        def cautious(variant: ServedVariant, n_images: int) -> float:
            return planning.SAFETY_FACTOR * costs(variant, n_images)

        variant, members = planning.next_batch(self.waiting, floors, now, cautious, max_batch)
        delay = self.limits.max_delay_seconds
        wake_at = planning.wait_for_more(self.waiting, members, variant, now, costs, max_batch, delay)
        if wake_at is not None:
            return Decision(expired, wake_at=wake_at)
        self._remove(set(members))
        batch = Batch(variant, members, now)
        self.running.append(Running(batch, self.seconds(variant, len(members))))
        return Decision(expired, batch)

    def finish(self, batch: Batch, now: float, is_measured: bool = True) -> None:
        """Remove a finished batch; learn from its run time if `is_measured`."""
        self._advance(now)
        (run,) = [run for run in self.running if run.batch is batch]
        self.running.remove(run)
        self._idle_since = now
        if is_measured:
            n_images, costs = self.limits.run_size(len(batch.entries)), batch.variant.costs
            self.pace.learn(run.seconds, costs.seconds(n_images))
            costs.learn(n_images, run.seconds / self.pace.factor)

    def _advance(self, now: float) -> None:
        """Divide the elapsed time among the running batches."""
        for run in self.running:
            run.seconds += (now - self._advanced_to) / len(self.running)
        self._advanced_to = now

    def _may_run_another(self, now: float) -> bool:
        """Return whether another batch may run without making a running one miss a deadline."""
        if len(self.running) >= self.limits.max_concurrent_batches:
            return False
        n_running = len(self.running) + 1
        return all(
            now + planning.SAFETY_FACTOR * n_running * run.remaining_seconds <= entry.deadline
            for run in self.running
            for entry in run.batch.entries
            if entry.deadline is not None and now + run.remaining_seconds <= entry.deadline
        )

    def _set_floors(self, now: float) -> None:
        if not self.running and now - self._idle_since >= planning.HOLD_SECONDS:
            self.rate_floors.clear()
        costs = self._costs()
        for family in {entry.family for entry in self.waiting if entry.is_flexible} | set(self.rate_floors):
            floor = self._next_floor(family, now, costs)
            if floor == RateFloor():
                self.rate_floors.pop(family, None)
            else:
                self.rate_floors[family] = floor

    def _next_floor(self, family: Family, now: float, costs: planning.Costs) -> RateFloor:
        current = self.rate_floors.get(family, RateFloor())
        ladders = {entry.ladder for entry in self.waiting if entry.family == family and entry.is_flexible}
        rates = sorted({planning.rate(variant) for ladder in ladders for variant in ladder})
        below = max((r for r in rates if r < current.r), default=0)
        if not ladders:
            return planning.next_floor(current, 0, below, is_comfortable=True, now=now)
        start, floors = self._free_at(now), self._floors()

        def keeps_slack(floor: int, share: float) -> bool:
            choice = planning.choice_at(family, floor, floors)
            return planning.keeps_slack(self.waiting, choice, now, start, costs, self.limits.max_batch_images, share)

        higher = [r for r in rates if r > current.r]
        needed = current.r
        if not keeps_slack(current.r, planning.PLANNED_SHARE):
            needed = next((r for r in higher if keeps_slack(r, planning.PLANNED_SHARE)), rates[-1])
        has_refused = now - self.refused_at.get(family, -math.inf) < planning.REFUSED_SECONDS
        if higher and (has_refused or self._is_filling()):
            # Degrading is better than refusing.
            needed = max(needed, higher[0])
        is_comfortable = not has_refused and below < current.r and keeps_slack(below, planning.LOWERING_SHARE)
        return planning.next_floor(current, needed, below, is_comfortable, now)

    def _is_filling(self) -> bool:
        """Return whether a queue is half full: with short runs, queues fill before the target latency is at risk."""
        return max(Counter(entry.ladder[0] for entry in self.waiting).values()) * 2 > self.limits.max_queue_images

    def _floors(self) -> dict[Family, int]:
        return {family: floor.r for family, floor in self.rate_floors.items()}

    def _free_at(self, now: float) -> float:
        """Estimate when the running batches will end."""
        elapsed = (now - self._advanced_to) if self.running else 0.0
        return now + max(0.0, sum(run.remaining_seconds for run in self.running) - elapsed)

    def seconds_until_drained(self, now: float) -> int:
        """Estimate the time until all current work is done. Units: whole seconds, at least 1."""
        floors = self._floors()

        def choice(entry: Entry) -> ServedVariant:
            return planning.at_floor(entry, floors.get(entry.family, 0))

        times = planning.finish_times(
            self.waiting, choice, self._free_at(now), self._costs(), self.limits.max_batch_images
        )
        return _whole_seconds(max((time for _, _, time in times), default=now) - now)

    def _costs_of_concurrent(self) -> planning.Costs:
        """Return the costs of a batch that starts now and shares the device with the running batches."""
        costs, remaining = self._costs(), sum(run.remaining_seconds for run in self.running)

        def shared(variant: ServedVariant, n_images: int) -> float:
            alone = costs(variant, n_images)
            return alone + min(alone, remaining)

        return shared

    def _costs(self, safety_factor: float = 1.0) -> planning.Costs:
        """Return memoised costs, for one decision."""
        known: dict[tuple[ServedVariant, int], float] = {}

        def costs(variant: ServedVariant, n_images: int) -> float:
            key = (variant, n_images)
            if key not in known:
                known[key] = safety_factor * self.seconds(variant, n_images)
            return known[key]

        return costs


def _whole_seconds(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)
