"""Scheduler: the state of one device's queues, changed by the functions of `policy`. No thread, no clock, no device."""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.catalogue import ServedVariant
from app.errors import DeadlineUnmeetable, QueueFull, ServiceError
from app.serving import policy
from app.serving.costs import Pace, batch_buckets
from app.serving.entry import Batch, Entry, Family
from app.serving.policy import Level

MAX_RETRY_SECONDS = 600


@dataclass(frozen=True)
class Limits:
    """n_lanes: how many runs may share the device. wait_seconds: how long an incomplete batch waits for more, from the
    first of its entries. is_padded: whether batches are filled up to a bucket, where the device plans for each size.
    """

    max_queue_images: int
    max_batch_images: int
    n_lanes: int = 1
    wait_seconds: float = 0.0
    is_padded: bool = False

    def run_size(self, n_images: int) -> int:
        """Return of how many images a run of these is, or would be if it could be so large."""
        if not self.is_padded:
            return n_images
        return next((size for size in batch_buckets(self.max_batch_images) if size >= n_images), n_images)


@dataclass
class Running:
    """A batch on the device, and how much of the device's time it has had. Units: seconds."""

    batch: Batch
    expected_seconds: float
    seconds: float = 0.0

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self.expected_seconds - self.seconds)


@dataclass(frozen=True)
class Turn:
    """What to do now that a lane of the device is free: answer those whose deadline is lost, and run a batch or wait.

    wake_at: when to look again although nothing came; None with nothing to wait for. Units: seconds.
    """

    expired: Sequence[Entry] = ()
    batch: Batch | None = None
    wake_at: float | None = None


@dataclass
class Scheduler:
    """An entry is waiting, then running, then gone; or leaves early, expired or withdrawn. Never twice anywhere.

    Runs that overlap share the device in equal parts. What a run costs is its part, so that costs add up whatever ran
    beside it.
    """

    limits: Limits
    waiting: list[Entry] = field(default_factory=list)  # by due time
    running: list[Running] = field(default_factory=list)
    levels: dict[Family, Level] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    refused_at: dict[Family, float] = field(default_factory=dict)
    _advanced_to: float = 0.0
    _idle_since: float = 0.0

    def __repr__(self) -> str:
        running = [len(run.batch.entries) for run in self.running]
        return f"<Scheduler waiting={len(self.waiting)} running={running} levels={self.levels}>"

    def seconds(self, variant: ServedVariant, n_images: int) -> float:
        """Expect what a run takes now, by itself."""
        return variant.costs.seconds(self.limits.run_size(n_images)) * self.pace.factor

    def depths_by_label(self) -> Counter[tuple[str, str, str]]:
        """Count what waits by model, policy and the rate preferred, as text."""
        return Counter((entry.family[0], entry.family[2], entry.ladder[0].label) for entry in self.waiting)

    def require_room(self, entries: Sequence[Entry], now: float) -> None:
        """Refuse entries for which there is no room, or no time.

        Raises: QueueFull, DeadlineUnmeetable; with the seconds after which it should be otherwise.
        """
        try:
            self._require_room(entries, now)
        except ServiceError:
            costs = self._costs()
            by_load = [entry for entry in entries if not policy.is_hopeless(entry, now, costs)]
            self.refused_at.update((entry.family, now) for entry in by_load)
            raise

    def _require_room(self, entries: Sequence[Entry], now: float) -> None:
        for variant, n_new in Counter(entry.ladder[0] for entry in entries).items():
            n_waiting = sum(entry.ladder[0] is variant for entry in self.waiting)
            if n_waiting + n_new > self.limits.max_queue_images:
                detail = f"{n_waiting} images wait for {variant.entry.id}, of at most {self.limits.max_queue_images}."
                raise QueueFull(detail, retry_after_seconds=self.seconds_until_drained(now))
        size, n_lanes = self.limits.max_batch_images, self.limits.n_lanes
        costs = self._costs(policy.CAUTION)
        late = policy.lateness(self.waiting, entries, self._free_at(now), costs, size, n_lanes)
        if late > 0:
            detail = f"At the present load the answer would come {math.ceil(late * 1e3)} ms after the deadline."
            raise DeadlineUnmeetable(detail, retry_after_seconds=_whole_seconds(late))

    def submit(self, entries: Sequence[Entry], now: float) -> None:
        """Queue the entries of a request, all or none.

        Raises: QueueFull, DeadlineUnmeetable.
        """
        self.require_room(entries, now)
        for entry in entries:
            insort(self.waiting, entry, key=lambda item: item.order)

    def withdraw(self, entries: Iterable[Entry]) -> list[Entry]:
        """Take out entries whose caller has left. Returns those that were still waiting."""
        leaving = set(entries)
        found = [entry for entry in self.waiting if entry in leaving]
        self.waiting = [entry for entry in self.waiting if entry not in leaving]
        return found

    def take(self, now: float) -> Turn:
        """Decide what a free lane of the device does next."""
        self._advance(now)
        costs = self._costs_beside_others()
        expired = [entry for entry in self.waiting if policy.is_hopeless(entry, now, costs)]
        if expired:
            lost = set(expired)
            self.waiting = [entry for entry in self.waiting if entry not in lost]
        if not self.waiting or not self._has_room_beside_others(now):
            return Turn(expired)
        self._set_levels(now)
        variant, members = self._next_members(now, lambda variant, n: policy.CAUTION * costs(variant, n))
        wake_at = self._wait_for_more(variant, members, now, costs)
        if wake_at is not None:
            return Turn(expired, wake_at=wake_at)
        chosen = set(members)
        self.waiting = [entry for entry in self.waiting if entry not in chosen]
        batch = Batch(variant, members, now)
        self.running.append(Running(batch, self.seconds(variant, len(members))))
        return Turn(expired, batch)

    def finish(self, batch: Batch, now: float, is_measured: bool = True) -> None:
        """Note that a batch has run, and learn from what it took, unless it failed."""
        self._advance(now)
        (run,) = [run for run in self.running if run.batch is batch]
        self.running.remove(run)
        self._idle_since = now
        if is_measured:
            n_images, costs = self.limits.run_size(len(batch.entries)), batch.variant.costs
            self.pace.learn(run.seconds, costs.seconds(n_images))
            costs.learn(n_images, run.seconds / self.pace.factor)

    def _advance(self, now: float) -> None:
        """Share the time that has passed among the runs."""
        for run in self.running:
            run.seconds += (now - self._advanced_to) / len(self.running)
        self._advanced_to = now

    def _has_room_beside_others(self, now: float) -> bool:
        """Tell whether a lane is free, and those that run would still keep their deadlines at half the speed."""
        if len(self.running) >= self.limits.n_lanes:
            return False
        n_lanes = len(self.running) + 1
        return all(
            now + policy.CAUTION * n_lanes * run.remaining_seconds <= entry.deadline
            for run in self.running
            for entry in run.batch.entries
            if entry.deadline is not None and now + run.remaining_seconds <= entry.deadline
        )

    def _next_members(self, now: float, costs: policy.Costs) -> tuple[ServedVariant, list[Entry]]:
        """Choose the batch of the most urgent entry: what runs as the same variant, in order of urgency."""
        chosen = {entry: policy.runnable(entry, self._floor(entry), now, costs) for entry in self.waiting}
        variant = chosen[self.waiting[0]]
        members = [entry for entry in self.waiting if chosen[entry] is variant][: self.limits.max_batch_images]
        n = policy.batch_size(members, set(self.waiting).difference(members), variant, now, costs)
        return variant, members[:n]

    def _wait_for_more(
        self, variant: ServedVariant, members: Sequence[Entry], now: float, costs: policy.Costs
    ) -> float | None:
        """Say until when to wait for more of a batch that is not full, unless that would cost somebody the deadline."""
        size = self.limits.max_batch_images
        wake_at = min(entry.submitted_at for entry in members) + self.limits.wait_seconds
        deadlines = [entry.deadline for entry in self.waiting if entry.deadline is not None]
        is_pressing = bool(deadlines) and wake_at + costs(variant, size) > min(deadlines)
        return None if len(members) == size or wake_at <= now or is_pressing else wake_at

    def _set_levels(self, now: float) -> None:
        if not self.running and now - self._idle_since >= policy.HOLD_SECONDS:
            self.levels.clear()  # the load is gone
        costs = self._costs()
        for family in {entry.family for entry in self.waiting if entry.is_flexible} | set(self.levels):
            level = self._next_level(family, now, costs)
            if level == Level():
                self.levels.pop(family, None)
            else:
                self.levels[family] = level

    def _next_level(self, family: Family, now: float, costs: policy.Costs) -> Level:
        level = self.levels.get(family, Level())
        ladders = {entry.ladder for entry in self.waiting if entry.family == family and entry.is_flexible}
        rates = sorted({policy.rate(variant) for ladder in ladders for variant in ladder})
        below = max((r for r in rates if r < level.floor), default=0)
        if not ladders:
            return policy.next_level(level, 0, below, is_comfortable=True, now=now)
        start, floors = self._free_at(now), {name: other.floor for name, other in self.levels.items()}

        def keeps_slack(floor: int, share: float) -> bool:
            choice = policy.choice_at(family, floor, floors)
            return policy.keeps_slack(self.waiting, choice, now, start, costs, self.limits.max_batch_images, share)

        higher = [r for r in rates if r > level.floor]
        needed = level.floor
        if not keeps_slack(level.floor, policy.PLANNED_SHARE):
            needed = next((r for r in higher if keeps_slack(r, policy.PLANNED_SHARE)), rates[-1])
        has_refused = now - self.refused_at.get(family, -math.inf) < policy.REFUSED_SECONDS
        if higher and (has_refused or self._is_filling()):
            needed = max(needed, higher[0])  # to degrade is better than to refuse
        is_comfortable = not has_refused and below < level.floor and keeps_slack(below, policy.LOWERING_SHARE)
        return policy.next_level(level, needed, below, is_comfortable, now)

    def _is_filling(self) -> bool:
        """Tell whether a queue is half full: where runs are short, it is full long before anyone is impatient."""
        return max(Counter(entry.ladder[0] for entry in self.waiting).values()) * 2 > self.limits.max_queue_images

    def _floor(self, entry: Entry) -> int:
        return self.levels.get(entry.family, Level()).floor

    def _free_at(self, now: float) -> float:
        """Expect when the device would be free if nothing more began."""
        elapsed = (now - self._advanced_to) if self.running else 0.0
        return now + max(0.0, sum(run.remaining_seconds for run in self.running) - elapsed)

    def seconds_until_drained(self, now: float) -> int:
        """Expect how long what is inside takes, in whole seconds, at least 1."""

        def choice(entry: Entry) -> ServedVariant:
            return policy.at_floor(entry, self._floor(entry))

        times = policy.finish_times(
            self.waiting, choice, self._free_at(now), self._costs(), self.limits.max_batch_images
        )
        return _whole_seconds(max((time for _, _, time in times), default=now) - now)

    def _costs_beside_others(self) -> policy.Costs:
        """Make the price list of what begins now: while others run, it has the device in part."""
        costs, remaining = self._costs(), sum(run.remaining_seconds for run in self.running)

        def shared(variant: ServedVariant, n_images: int) -> float:
            alone = costs(variant, n_images)
            return alone + min(alone, remaining)

        return shared

    def _costs(self, caution: float = 1.0) -> policy.Costs:
        """Make a price list for one decision, which asks the same prices many times."""
        known: dict[tuple[ServedVariant, int], float] = {}

        def costs(variant: ServedVariant, n_images: int) -> float:
            key = (variant, n_images)
            if key not in known:
                known[key] = caution * self.seconds(variant, n_images)
            return known[key]

        return costs


def _whole_seconds(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)
