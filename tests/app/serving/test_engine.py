import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from app.backends import Outputs, Pixels
from app.errors import BackendError, EngineStalled, InferenceFailed, ShuttingDown
from app.observability.record import ImageResult
from app.serving.engine import Engine
from app.serving.entry import Entry, Outcome
from app.serving.scheduler import SchedulerLimits
from app.store.catalogue import Catalogue, ServedVariant
from app.store.costs import CostTable

# Timeout; a test that reaches it has failed.
SECONDS = 10


class GatedRunner:
    """Blocks until the gate opens, and records batch sizes. Fails for images whose first value is in `faulty`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.sizes: list[int] = []
        self.faulty: set[int] = set()
        self.error: BaseException = BackendError("broken")
        self.value = 0.0

    def run(self, pixels: Pixels) -> Outputs:
        self.started.set()
        assert self.gate.wait(SECONDS)
        self.sizes.append(len(pixels))
        marks = pixels[:, 0, 0, 0]
        if self.faulty & set(marks.tolist()):
            raise self.error
        return {"logits": np.repeat(marks[:, None].astype(np.float32) + np.float32(self.value), 3, axis=1)}


class Deliveries:
    """Records outcomes, and checks that each entry gets only one."""

    def __init__(self) -> None:
        self.outcomes: dict[Entry, Outcome] = {}
        self._changed = threading.Condition()

    def put(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        with self._changed:
            for entry, outcome in outcomes:
                assert entry not in self.outcomes
                self.outcomes[entry] = outcome
            self._changed.notify_all()

    def get(self, entry: Entry) -> Outcome:
        with self._changed:
            assert self._changed.wait_for(lambda: entry in self.outcomes, SECONDS)
            return self.outcomes[entry]

    def result(self, entry: Entry) -> ImageResult:
        outcome = self.get(entry)
        assert isinstance(outcome, ImageResult)
        return outcome


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture
def deliveries() -> Deliveries:
    return Deliveries()


@pytest.fixture
def variant(catalogue: Catalogue, runner: GatedRunner) -> ServedVariant:
    return ServedVariant(catalogue.find(None, None).variant("tome", 8).spec, runner)


MakeEntries = Callable[[int], list[Entry]]


@pytest.fixture
def make_entries(variant: ServedVariant, engine: Engine) -> MakeEntries:
    def make(n: int) -> list[Entry]:
        now = engine.clock()
        images = [np.full((8, 8, 3), i, np.uint8) for i in range(n)]
        return [Entry(image, (variant,), ("tiny", "1", "tome"), now, now + 1) for image in images]

    return make


@pytest.fixture
def engine(runner: GatedRunner, deliveries: Deliveries) -> Iterator[Engine]:
    engine = Engine(SchedulerLimits(max_queue_images=64, max_batch_images=4), deliveries.put)
    engine.start()
    yield engine
    runner.gate.set()
    engine.stop(SECONDS)


def test_engine_batches_images_queued_during_a_run(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    (first,) = make_entries(1)
    engine.submit([first])
    assert runner.started.wait(SECONDS)
    others = [make_entries(2)[1], *make_entries(3)]
    for entry in others:
        engine.submit([entry])
    runner.gate.set()
    assert [deliveries.result(entry).batch_size for entry in (first, *others)] == [1, 4, 4, 4, 4]
    assert runner.sizes == [1, 4]
    assert [int(deliveries.result(entry).outputs["logits"][0]) for entry in others] == [1, 0, 1, 2]
    done = deliveries.result(others[0])
    assert done.queue_seconds > 0
    assert done.inference_seconds > 0
    assert not done.is_degraded


def test_engine_observes_each_batch(variant: ServedVariant, runner: GatedRunner, deliveries: Deliveries) -> None:
    seen: list[tuple[int, float]] = []
    engine = Engine(
        SchedulerLimits(64, 4), deliveries.put, lambda batch, seconds: seen.append((len(batch.entries), seconds))
    )
    engine.start()
    runner.gate.set()
    entry = Entry(np.zeros((8, 8, 3), np.uint8), (variant,), ("tiny", "1", "tome"), engine.clock(), engine.clock() + 1)
    engine.submit([entry])
    done = deliveries.result(entry)
    ((n_images, seconds),) = seen
    assert n_images == 1
    assert seconds == pytest.approx(done.inference_seconds, abs=0.05)
    summary = variant.latency.summary_ms()
    assert summary is not None
    assert summary[2] == 1
    engine.stop(SECONDS)


def test_engine_drops_withdrawn_entries(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    first, second, third = make_entries(1) + make_entries(1) + make_entries(1)
    for entry in (first, second, third):
        engine.submit([entry])
        assert runner.started.wait(SECONDS)
    # The first is already running.
    assert engine.withdraw([first, second]) == 1
    runner.gate.set()
    deliveries.get(third)
    assert runner.sizes == [1, 1]
    assert set(deliveries.outcomes) == {third}


@pytest.mark.parametrize("error", [BackendError("broken"), ValueError("unexpected"), MemoryError()])
@pytest.mark.parametrize("faulty", [{0}, {3}, {1, 2}, {0, 1, 2, 3}])
def test_only_faulty_images_of_a_failing_batch_fail(
    engine: Engine,
    make_entries: MakeEntries,
    runner: GatedRunner,
    deliveries: Deliveries,
    error: Exception,
    faulty: set[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner.gate.set()
    runner.faulty, runner.error = faulty, error
    entries = make_entries(4)
    engine.submit(entries)
    for i, entry in enumerate(entries):
        if i in faulty:
            assert isinstance(deliveries.get(entry), InferenceFailed)
        else:
            assert int(deliveries.result(entry).outputs["logits"][0]) == i
    assert "Traceback" in caplog.text
    runner.faulty = set()
    (entry,) = make_entries(1)
    engine.submit([entry])
    assert deliveries.result(entry).batch_size == 1


def test_engine_refuses_non_finite_logits(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    runner.gate.set()
    runner.value = float("nan")
    (entry,) = make_entries(1)
    engine.submit([entry])
    assert isinstance(deliveries.get(entry), InferenceFailed)


def test_engine_pads_batches_if_configured(variant: ServedVariant, runner: GatedRunner, deliveries: Deliveries) -> None:
    variant = ServedVariant(variant.spec, runner, costs=CostTable({1: 1.0, 8: 1.1}))
    engine = Engine(SchedulerLimits(64, 8, is_padded=True), deliveries.put)
    engine.start()
    runner.gate.set()
    now = engine.clock()
    entries = [
        Entry(np.full((8, 8, 3), i, np.uint8), (variant,), ("tiny", "1", "tome"), now, now + 1) for i in range(5)
    ]
    engine.submit(entries)
    assert [int(deliveries.result(entry).outputs["logits"][0]) for entry in entries] == [0, 1, 2, 3, 4]
    assert [deliveries.result(entry).batch_size for entry in entries] == [5] * 5
    assert runner.sizes == [8]
    engine.stop(SECONDS)


def test_batches_run_concurrently(variant: ServedVariant, runner: GatedRunner, deliveries: Deliveries) -> None:
    engine = Engine(SchedulerLimits(64, 2, max_concurrent_batches=2), deliveries.put)
    now = engine.clock()
    entries = [
        Entry(np.full((8, 8, 3), i, np.uint8), (variant,), ("tiny", "1", "tome"), now, now + 1) for i in range(6)
    ]
    engine.start()
    engine.submit(entries)
    while len(engine._scheduler.running) < 2:
        pass
    assert len(engine._scheduler.waiting) == 2
    runner.gate.set()
    assert [int(deliveries.result(entry).outputs["logits"][0]) for entry in entries] == list(range(6))
    engine.stop(SECONDS)


def test_stop_finishes_running_batches_and_refuses_queued_entries(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    (running,) = make_entries(1)
    engine.submit([running])
    assert runner.started.wait(SECONDS)
    waiting = make_entries(3)
    engine.submit(waiting)
    stopping = threading.Thread(target=engine.stop, args=(SECONDS,))
    stopping.start()
    for entry in waiting:
        assert isinstance(deliveries.get(entry), ShuttingDown)
    runner.gate.set()
    stopping.join(SECONDS)
    assert deliveries.result(running).batch_size == 1
    with pytest.raises(ShuttingDown):
        engine.submit(make_entries(1))


def test_stop_fails_the_entries_of_a_hanging_run(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    (hanging,) = make_entries(1)
    engine.submit([hanging])
    assert runner.started.wait(SECONDS)
    engine.stop(timeout_seconds=0)
    assert isinstance(deliveries.get(hanging), ShuttingDown)
    # The late result is not delivered.
    runner.gate.set()


def test_abandon_fails_every_entry_in_flight(
    engine: Engine, make_entries: MakeEntries, runner: GatedRunner, deliveries: Deliveries
) -> None:
    running, waiting = make_entries(1), make_entries(3)
    engine.submit(running)
    assert runner.started.wait(SECONDS)
    engine.submit(waiting)
    assert engine.abandon(InferenceFailed()) == 4
    assert all(isinstance(deliveries.get(entry), InferenceFailed) for entry in (*running, *waiting))
    runner.gate.set()
    (entry,) = make_entries(1)
    engine.submit([entry])
    assert deliveries.result(entry).batch_size == 1


def test_dead_worker_fails_all_entries_and_refuses_new_ones(
    engine: Engine,
    make_entries: MakeEntries,
    runner: GatedRunner,
    deliveries: Deliveries,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: object, **words: object) -> None:
        raise KeyError("a bug")

    (running,) = make_entries(1)
    engine.submit([running])
    assert runner.started.wait(SECONDS)
    waiting = make_entries(2)
    engine.submit(waiting)
    monkeypatch.setattr(engine._scheduler, "finish", fail)
    runner.gate.set()
    assert all(isinstance(deliveries.get(entry), InferenceFailed) for entry in (running, *waiting))
    engine._workers[0].join(SECONDS)
    assert not engine.is_responsive(60)
    assert "a bug" in caplog.text
    with pytest.raises(EngineStalled):
        engine.submit(make_entries(1))


def test_engine_is_unresponsive_during_a_run_that_is_too_long(
    variant: ServedVariant, runner: GatedRunner, deliveries: Deliveries
) -> None:
    now = 0.0
    engine = Engine(SchedulerLimits(64, 4), deliveries.put, clock=lambda: now)
    assert not engine.is_responsive(60)
    engine.start()
    assert engine.is_responsive(60)
    entry = Entry(np.zeros((8, 8, 3), np.uint8), (variant,), ("tiny", "1", "tome"), 0.0, 1.0)
    engine.submit([entry])
    assert runner.started.wait(SECONDS)
    now = 59.0
    assert engine.is_responsive(60)
    now = 61.0
    assert not engine.is_responsive(60)
    runner.gate.set()
    deliveries.get(entry)
    engine.stop(SECONDS)
    assert not engine.is_responsive(60)
