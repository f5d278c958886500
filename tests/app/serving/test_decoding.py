import threading
import time
import weakref

from app.errors import QueueFull
from app.serving.decoding import CHEAP_BYTES, MAX_BACKLOG_SECONDS, DecodeQueue, Decoders
from app.store.image_cost import DecodingCost
from tests.integration.server import wait_until

BUDGET = 300_000_000
CHEAP = DecodingCost(1, 1000, 0.001)


def costly(seconds: float = 1.0, n_bytes: int = 100_000_000) -> DecodingCost:
    return DecodingCost(1, n_bytes, seconds)


class Job:
    """An image of a request, of a given cost. It runs until `may_end`."""

    def __init__(self, request: object, cost: DecodingCost | None = CHEAP) -> None:
        self.request, self.cost = request, cost
        self.error: QueueFull | None = None
        self.has_started, self.may_end, self.is_done = threading.Event(), threading.Event(), threading.Event()
        self.may_end.set()

    def open(self) -> DecodingCost | None:
        return self.cost

    def decode(self) -> None:
        self.has_started.set()
        assert self.may_end.wait(30)
        self.is_done.set()

    def refuse(self, error: QueueFull) -> None:
        self.error = error


def take_all(queue: DecodeQueue, now: float) -> list[Job]:
    """Take the costly images one after the other, each after the end of the one before."""
    taken = []
    while (item := queue.take_costly(now)) is not None:
        taken.append(item[0])
        queue.end_costly(item[1])
    return taken  # type: ignore[return-value]


def test_requests_take_turns_to_have_an_image_opened() -> None:
    queue = DecodeQueue(2, BUDGET)
    form, single, other = ([Job("form") for _ in range(3)], Job("single"), Job("other"))
    for job in (*form, single, other):
        queue.add(job)
    assert [queue.take_unopened() for _ in range(6)] == [form[0], single, other, form[1], form[2], None]


def test_cheaper_images_pass_costly_ones_that_have_not_waited_long() -> None:
    queue = DecodeQueue(2, BUDGET)
    slow, quick, late = Job("slow"), Job("quick"), Job("late")
    queue.add_costly(slow, costly(2.0), now=0.0)
    queue.add_costly(quick, costly(0.2), now=1.0)
    queue.add_costly(late, costly(0.2), now=19.0)
    assert take_all(queue, 19.0) == [quick, slow, late]


def test_each_image_of_a_request_adds_to_the_time_of_its_next_ones() -> None:
    queue = DecodeQueue(2, BUDGET)
    form, single = [Job("form") for _ in range(3)], Job("single")
    for job in form:
        queue.add_costly(job, costly(1.0), now=0.0)
    queue.add_costly(single, costly(1.5), now=0.1)
    assert take_all(queue, 0.1) == [form[0], single, form[1], form[2]]


def test_a_costly_image_that_is_due_passes_unopened_ones() -> None:
    queue = DecodeQueue(1, BUDGET)
    queue.add_costly(Job("slow"), costly(1.0), now=0.0)
    queue.add(Job("cheap"))
    assert queue.take_costly(9.9) is None
    assert queue.take_costly(10.1) is not None


def test_costly_images_leave_one_thread_and_share_the_budget() -> None:
    queue = DecodeQueue(4, BUDGET)
    for _ in range(3):
        queue.add_costly(Job("a"), costly(0.2, BUDGET // 2), now=0.0)
    running = [queue.take_costly(0.0), queue.take_costly(0.0)]
    # A smaller one does not pass the one that waits for memory, or that would wait for ever.
    queue.add_costly(Job("small"), costly(20.0, 0), now=0.0)
    assert queue.take_costly(0.0) is None
    assert running[0] is not None
    queue.end_costly(running[0][1])
    assert queue.take_costly(0.0) is not None
    assert queue.take_costly(0.0) is not None
    # Three run: one thread is left.
    queue.add_costly(Job("small"), costly(0.2, 0), now=0.0)
    assert queue.take_costly(0.0) is None


def test_above_the_backlog_the_most_expensive_images_are_refused() -> None:
    queue = DecodeQueue(2, BUDGET)
    n_fit = int(MAX_BACKLOG_SECONDS / 2)
    first = [Job(index) for index in range(n_fit)]
    assert [queue.add_costly(job, costly(2.0), now=0.0) for job in first] == [[]] * n_fit
    newcomer, monster = Job("newcomer"), Job("monster")
    ((refused, error),) = queue.add_costly(newcomer, costly(0.5), now=0.1)
    assert refused is first[-1]
    assert error.headers["Retry-After"] == str(round(MAX_BACKLOG_SECONDS - 1.5 + 0.5))
    ((refused, _),) = queue.add_costly(monster, costly(60.0), now=0.1)
    assert refused is monster


def test_a_single_image_may_take_any_time() -> None:
    queue = DecodeQueue(2, BUDGET)
    assert queue.add_costly(Job("monster"), costly(60.0), now=0.0) == []


def test_withdraw_drops_all_images_of_a_request() -> None:
    queue = DecodeQueue(2, BUDGET)
    gone, kept = object(), Job("kept")
    for job in (Job(gone), kept):
        queue.add(job)
        queue.add_costly(job, costly(), now=0.0)
    queue.withdraw(gone)
    assert queue.take_unopened() is kept
    assert take_all(queue, 0.0) == [kept]


def test_a_cheap_image_does_not_wait_for_costly_ones() -> None:
    decoders = Decoders(2, BUDGET, time.monotonic)
    decoders.start()
    slow = [Job(index, costly(0.5)) for index in range(4)]
    try:
        for job in slow:
            job.may_end.clear()
            decoders.submit(job)
        assert slow[0].has_started.wait(30)
        cheap = Job("cheap")
        decoders.submit(cheap)
        assert cheap.is_done.wait(30)
        assert not slow[1].has_started.is_set()
        for job in slow:
            job.may_end.set()
        assert all(job.is_done.wait(30) for job in slow)
    finally:
        decoders.stop()


def test_an_image_is_costly_by_its_memory_or_its_time() -> None:
    decoders = Decoders(2, BUDGET, time.monotonic)
    jobs = [Job(1, costly(0.0, CHEAP_BYTES + 1)), Job(2, costly(1.0, 1)), Job(3, None)]
    for job in jobs:
        decoders._open(job)
    assert not any(job.has_started.is_set() for job in jobs)
    assert len(decoders._queue._waiting) == 2


def test_an_idle_thread_keeps_no_request() -> None:
    decoders = Decoders(1, BUDGET, time.monotonic)
    kept: list[weakref.ref[Job]] = []
    decoders.start()
    try:
        for cost in (costly(0.0, 1), costly(1.0)):
            job = Job(1, cost)
            decoders.submit(job)
            assert job.is_done.wait(30)
            kept.append(weakref.ref(job))
            del job
            wait_until(lambda: kept[-1]() is None)
    finally:
        decoders.stop()
