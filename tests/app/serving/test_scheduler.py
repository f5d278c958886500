"""Random arrivals, deadlines, wishes, cancellations and clocks, against what must always hold."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DeadlineUnmeetable, QueueFull
from app.serving.entry import Entry
from app.serving.planning import CAUTION, HOLD_SECONDS
from app.serving.scheduler import Scheduler, SchedulerLimits
from app.store.catalogue import ServedVariant
from tests.app.simulation import FAMILY, NO_PIXELS, Simulation, make_served

MAX_BATCH = 4
RATES = (0, 8, 16)
PATIENCE = 0.25


def true_seconds(variant: ServedVariant, n_images: int) -> float:
    r = variant.spec.r or 0
    return (2 + 8 * n_images * (1 - r / 32)) / 1e3


Ladder = tuple[ServedVariant, ...]


def make_ladder() -> Ladder:
    """Make variants that have learned nothing yet beyond the truth."""
    bare = [make_served(r, {1: 1.0}) for r in RATES]
    return tuple(
        make_served(r, {n: true_seconds(variant, n) for n in (1, 2, 4)}, 0.9 - r / 100)
        for r, variant in zip(RATES, bare, strict=True)
    )


@pytest.fixture
def ladder() -> Ladder:
    return make_ladder()


@dataclass(frozen=True)
class Wish:
    """When a request comes, of how many images, which rungs it allows, its deadline, and whether its caller leaves."""

    gap_ms: float
    n_images: int
    first: int
    last: int
    deadline_ms: float | None
    leaves_after_ms: float | None


wishes = st.builds(
    Wish,
    st.floats(0, 40),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 2),
    st.none() | st.floats(1, 400),
    st.none() | st.floats(0, 100),
)

lanes = st.integers(1, 3)


def simulate(
    requests: list[Wish],
    slowdown: float = 1.0,
    wait_ms: float = 0.0,
    max_queue: int = 12,
    max_concurrent_batches: int = 1,
) -> Simulation:
    limits = SchedulerLimits(max_queue, MAX_BATCH, max_concurrent_batches, wait_ms / 1e3)
    simulation = Simulation(limits, lambda variant, n: slowdown * true_seconds(variant, n))
    time, ladder = 0.0, make_ladder()
    for wish in requests:
        time += wish.gap_ms / 1e3
        entries = make_entries(wish, time, ladder)
        simulation.submit_at(time, lambda _, entries=entries: entries)  # type: ignore[misc]
        if wish.leaves_after_ms is not None:
            simulation.withdraw_at(time + wish.leaves_after_ms / 1e3, entries)
    simulation.run()
    return simulation


def make_entries(wish: Wish, now: float, rungs: Ladder) -> list[Entry]:
    ladder = rungs[wish.first : max(wish.first, wish.last) + 1]
    deadline = None if wish.deadline_ms is None else now + wish.deadline_ms / 1e3
    due = now + PATIENCE if deadline is None else deadline
    return [Entry(NO_PIXELS, ladder, FAMILY, now, due, deadline) for _ in range(wish.n_images)]


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes, max_size=40), st.floats(0.3, 3), st.sampled_from([0.0, 5.0]), lanes)
def test_every_entry_ends_in_exactly_one_way(
    requests: list[Wish], slowdown: float, wait_ms: float, max_concurrent_batches: int
) -> None:
    simulation = simulate(requests, slowdown, wait_ms, max_concurrent_batches=max_concurrent_batches)
    assert len(simulation.fates) == sum(wish.n_images for wish in requests)  # settling twice is an error there
    assert simulation.scheduler.waiting == []
    assert simulation.scheduler.running == []
    ran = [entry for batch in simulation.batches for entry in batch.entries]
    assert len(ran) == len(set(ran))
    assert all(simulation.fates[entry] in ("done", "late") for entry in ran)


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes, max_size=40), st.floats(0.3, 3), lanes)
def test_nobody_runs_as_what_was_not_agreed_and_no_batch_is_too_large(
    requests: list[Wish], slowdown: float, max_concurrent_batches: int
) -> None:
    simulation = simulate(requests, slowdown, max_concurrent_batches=max_concurrent_batches)
    for batch in simulation.batches:
        assert 1 <= len(batch.entries) <= MAX_BATCH
        for entry in batch.entries:
            assert batch.variant in entry.ladder
            assert entry.deadline is None or batch.started_at <= entry.deadline


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes, max_size=60))
def test_no_queue_is_longer_than_its_bound(requests: list[Wish]) -> None:
    scheduler = Scheduler(SchedulerLimits(8, MAX_BATCH))
    time, ladder = 0.0, make_ladder()
    for wish in requests:
        time += wish.gap_ms / 1e3
        entries = make_entries(wish, time, ladder)
        n_waiting = sum(entry.ladder[0] is entries[0].ladder[0] for entry in scheduler.waiting)
        try:
            scheduler.submit(entries, time)
        except QueueFull:
            assert n_waiting + len(entries) > 8
        except DeadlineUnmeetable:
            assert wish.deadline_ms is not None or any(entry.deadline is not None for entry in scheduler.waiting)
        assert max(Counter(entry.ladder[0] for entry in scheduler.waiting).values(), default=0) <= 8


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes, max_size=60), st.floats(0.3, 3), lanes)
def test_no_variant_starves(requests: list[Wish], slowdown: float, max_concurrent_batches: int) -> None:
    """Once its due time is past, an entry runs before all that came later: at most as many batches as were waiting."""
    simulation = simulate(requests, slowdown, max_concurrent_batches=max_concurrent_batches)
    began_at = {entry: batch.started_at for batch in simulation.batches for entry in batch.entries}
    for entry, time in began_at.items():
        later = [
            batch
            for batch in simulation.batches
            if entry.due <= batch.started_at < time and all(other.order > entry.order for other in batch.entries)
        ]
        assert later == []


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes, max_size=40), lanes)
def test_a_deadline_is_missed_only_for_what_was_as_urgent_or_already_ran(
    requests: list[Wish], max_concurrent_batches: int
) -> None:
    """No deadline that could have been met by order is missed by more than a batch: while an entry that is late or
    lost waits, each batch but the one that ran when it came begins with one whose due time was no later.
    """
    simulation = simulate(
        [wish for wish in requests if wish.leaves_after_ms is None], max_concurrent_batches=max_concurrent_batches
    )
    began_at = {entry: batch.started_at for batch in simulation.batches for entry in batch.entries}
    for entry, fate in simulation.fates.items():
        if fate not in ("late", "expired"):
            continue
        end = began_at.get(entry, entry.due)
        for batch in simulation.batches:
            if entry.submitted_at < batch.started_at < end and entry not in batch.entries:
                assert batch.entries[0].order <= entry.order


@settings(max_examples=100, deadline=None)
@given(st.lists(wishes, max_size=40), lanes)
def test_who_is_let_in_with_a_deadline_and_stays_is_in_time_when_costs_are_as_expected(
    requests: list[Wish], max_concurrent_batches: int
) -> None:
    """Requests without a deadline that fall due first are not foreseen; without them the promise is kept but for the
    one batch by which younger companions may hold up a run.
    """
    timed = [wish for wish in requests if wish.deadline_ms is not None]
    simulation = simulate(timed, max_queue=1000, max_concurrent_batches=max_concurrent_batches)
    one_batch = true_seconds(make_ladder()[0], MAX_BATCH)
    for entry, fate in simulation.fates.items():
        assert entry.deadline is not None
        if fate == "late":
            assert simulation.finished_at[entry] - entry.deadline <= one_batch


def entry(now: float, *ladder: ServedVariant, deadline: float | None = None) -> Entry:
    return Entry(NO_PIXELS, ladder, FAMILY, now, now + PATIENCE if deadline is None else deadline, deadline)


def test_take_runs_together_what_waited_for_one_variant_in_order_of_urgency(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    first, other, second = entry(0.0, ladder[0]), entry(0.001, ladder[2]), entry(0.002, ladder[0])
    scheduler.submit([first], 0.0)
    scheduler.submit([other], 0.001)
    scheduler.submit([second], 0.002)
    batch = scheduler.decide(0.003).batch
    assert batch is not None
    assert list(batch.entries) == [first, second]
    scheduler.finish(batch, 0.02)
    batch = scheduler.decide(0.02).batch
    assert batch is not None
    assert list(batch.entries) == [other]


def test_a_deadline_overtakes_those_without_one(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, 1))
    patient, hurried = entry(0.0, ladder[0]), entry(0.01, ladder[1], deadline=0.1)
    scheduler.submit([patient], 0.0)
    scheduler.submit([hurried], 0.01)
    batch = scheduler.decide(0.01).batch
    assert batch is not None
    assert list(batch.entries) == [hurried]


def test_the_rate_rises_with_the_queue_for_those_who_consent_and_falls_when_it_drains(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    scheduler.submit([entry(0.0, *ladder) for _ in range(40)], 0.0)
    scheduler.submit([entry(0.0, ladder[0]) for _ in range(4)], 0.0)
    now, rates = 0.0, list[int]()
    while scheduler.waiting:
        batch = scheduler.decide(now).batch
        assert batch is not None
        rates.append(batch.variant.spec.r or 0)
        if len(batch.entries[0].ladder) == 1:
            assert batch.variant.spec.r == 0  # who does not consent is never changed
        now += true_seconds(batch.variant, len(batch.entries))
        scheduler.finish(batch, now)
    assert rates[0] == 16
    seen = list[int]()
    for _ in range(20):  # hysteresis: not at once, and by one rate at a time
        now += HOLD_SECONDS / 2
        scheduler.submit([entry(now, *ladder)], now)
        batch = scheduler.decide(now).batch
        assert batch is not None
        seen.append(batch.variant.spec.r or 0)
        now += 0.001
        scheduler.finish(batch, now, is_measured=False)
    assert seen[0] == 16
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {16, 8, 0}


def test_nobody_is_degraded_once_the_device_stood_idle(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    scheduler.submit([entry(0.0, *ladder) for _ in range(40)], 0.0)
    now = 0.0
    while scheduler.waiting:
        batch = scheduler.decide(now).batch
        assert batch is not None
        now += 0.01
        scheduler.finish(batch, now, is_measured=False)
    assert scheduler.rate_floors
    now += HOLD_SECONDS
    scheduler.submit([entry(now, *ladder)], now)
    batch = scheduler.decide(now).batch
    assert batch is not None
    assert batch.variant is ladder[0]


def test_a_deadline_that_no_device_could_meet_degrades_nobody(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    with pytest.raises(DeadlineUnmeetable):
        scheduler.submit([entry(0.0, *ladder, deadline=0.001)], 0.0)
    scheduler.submit([entry(0.0, *ladder)], 0.0)
    batch = scheduler.decide(0.0).batch
    assert batch is not None
    assert batch.variant is ladder[0]


def test_a_short_queue_that_is_half_full_raises_the_rate_before_anyone_is_impatient(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(8, MAX_BATCH))
    scheduler.submit([entry(0.0, *ladder) for _ in range(5)], 0.0)
    batch = scheduler.decide(0.0).batch
    assert batch is not None
    assert batch.variant.spec.r == 8


def test_a_deadline_that_cannot_be_met_is_refused_with_the_time_to_come_back(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(500, MAX_BATCH))
    scheduler.submit([entry(0.0, ladder[0], deadline=3.0) for _ in range(300)], 0.0)
    with pytest.raises(DeadlineUnmeetable) as refusal:
        scheduler.submit([entry(0.0, ladder[0], deadline=2.9) for _ in range(60)], 0.0)
    wait = int(refusal.value.headers["Retry-After"])
    assert 1 <= wait <= 60
    seconds = 300 / MAX_BATCH * true_seconds(ladder[0], MAX_BATCH)
    with pytest.raises(QueueFull) as full:
        scheduler.submit([entry(0.0, ladder[0]) for _ in range(201)], 0.0)
    assert int(full.value.headers["Retry-After"]) == math.ceil(seconds)


def test_a_deadline_too_near_for_any_run_expires_without_work(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    lost, other = entry(0.0, ladder[0], ladder[2], deadline=0.05), entry(0.0, ladder[0])
    scheduler.submit([lost, other], 0.0)
    decision = scheduler.decide(0.05 - true_seconds(ladder[2], 1) + 0.001)
    assert list(decision.expired) == [lost]
    assert decision.batch is not None
    assert list(decision.batch.entries) == [other]


def test_a_deadline_takes_the_most_accurate_variant_that_it_leaves_time_for(ladder: Ladder) -> None:
    for slack, r in ((0.1, 0), (0.0095, 8), (0.0075, 16)):
        scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
        scheduler.submit([entry(0.0, *ladder, deadline=1.0)], 0.0)
        batch = scheduler.decide(1.0 - slack).batch
        assert batch is not None
        assert batch.variant.spec.r == r


def test_an_incomplete_batch_waits_only_if_told_and_never_at_the_price_of_a_deadline(ladder: Ladder) -> None:
    limits = SchedulerLimits(64, MAX_BATCH, max_delay_seconds=0.02)
    scheduler = Scheduler(limits)
    scheduler.submit([entry(0.0, ladder[0])], 0.0)
    decision = scheduler.decide(0.0)
    assert decision.batch is None
    assert decision.wake_at == pytest.approx(0.02)
    assert scheduler.decide(0.02).batch is not None
    scheduler = Scheduler(limits)
    scheduler.submit([entry(0.0, ladder[0], deadline=0.03)], 0.0)
    assert scheduler.decide(0.0).batch is not None
    scheduler = Scheduler(limits)
    scheduler.submit([entry(0.0, ladder[0]) for _ in range(MAX_BATCH)], 0.0)
    assert scheduler.decide(0.0).batch is not None


def test_a_batch_is_no_longer_than_another_deadline_allows(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    patient = [entry(-1.0, ladder[0]) for _ in range(4)]  # overdue: they go first
    needed = CAUTION * (true_seconds(ladder[0], 2) + true_seconds(ladder[2], 1))
    hurried = entry(0.0, ladder[2], deadline=needed + 0.001)
    for item in (*patient, hurried):
        scheduler.waiting.append(item)
    batch = scheduler.decide(0.0).batch
    assert batch is not None
    assert len(batch.entries) == 2


def test_a_failed_run_teaches_nothing(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, MAX_BATCH))
    before = scheduler.seconds(ladder[0], 1)
    scheduler.submit([entry(0.0, ladder[0])], 0.0)
    batch = scheduler.decide(0.0).batch
    assert batch is not None
    scheduler.finish(batch, 5.0, is_measured=False)
    assert scheduler.seconds(ladder[0], 1) == before


def test_padded_runs_are_priced_at_the_size_that_runs(ladder: Ladder) -> None:
    scheduler = Scheduler(SchedulerLimits(64, 16, is_padded=True))
    assert [scheduler.limits.run_size(n) for n in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    assert scheduler.seconds(ladder[0], 3) == scheduler.seconds(ladder[0], 4)
