import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait

import numpy as np
import pytest
from numpy.typing import NDArray

from app.backends import Answer, Pixels
from app.catalogue import Catalogue, ServedVariant
from app.errors import BackendError, InferenceFailed, ShuttingDown
from app.serving.engine import Engine, Inference

SECONDS = 10  # more than any of this takes; a test that reaches it has failed


class GatedRunner:
    """Runs when it is let, and remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.sizes: list[int] = []
        self.error: Exception | None = None
        self.value = 0.0

    def run(self, pixels: Pixels) -> Answer:
        self.started.set()
        assert self.gate.wait(SECONDS)
        self.sizes.append(len(pixels))
        if self.error is not None:
            raise self.error
        return Answer(np.full((len(pixels), 3), self.value, np.float32))


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture
def variant(catalogue: Catalogue, runner: GatedRunner) -> ServedVariant:
    return ServedVariant(catalogue.find(None, None).variants["tome", 8].entry, runner)


@pytest.fixture
def engine(runner: GatedRunner) -> Iterator[Engine]:
    engine = Engine(max_batch_images=4)
    engine.start()
    yield engine
    runner.gate.set()
    engine.stop(SECONDS)


def images(n: int) -> NDArray[np.uint8]:
    return np.zeros((n, 8, 8, 3), np.uint8)


def test_engine_runs_a_request_in_bounded_batches(engine: Engine, variant: ServedVariant, runner: GatedRunner) -> None:
    runner.gate.set()
    inference = engine.submit(variant, images(10)).result(SECONDS)
    assert runner.sizes == [4, 4, 2]
    assert inference.batch_sizes == [4] * 8 + [2] * 2
    assert inference.answer.logits.shape == (10, 3)
    assert inference.inference_seconds > 0


def test_engine_times_single_images_for_the_latency_log(
    engine: Engine, variant: ServedVariant, runner: GatedRunner
) -> None:
    runner.gate.set()
    engine.submit(variant, images(2)).result(SECONDS)
    assert variant.latency.summary_ms() is None
    inference = engine.submit(variant, images(1)).result(SECONDS)
    ms = inference.inference_seconds * 1e3
    assert variant.latency.summary_ms() == (ms, ms, 1)


def test_engine_drops_cancelled_entries_at_dequeue(engine: Engine, variant: ServedVariant, runner: GatedRunner) -> None:
    first, second, third = (engine.submit(variant, images(n)) for n in (1, 2, 3))
    assert runner.started.wait(SECONDS)
    assert second.cancel()
    assert not first.cancel()
    runner.gate.set()
    wait([first, third], SECONDS)
    assert runner.sizes == [1, 3]


@pytest.mark.parametrize("error", [BackendError("broken"), ValueError("unexpected"), MemoryError()])
def test_engine_survives_a_failing_backend(
    engine: Engine, variant: ServedVariant, runner: GatedRunner, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runner.gate.set()
    runner.error = error
    with pytest.raises(InferenceFailed):
        engine.submit(variant, images(1)).result(SECONDS)
    assert "Traceback" in caplog.text
    runner.error = None
    assert engine.submit(variant, images(1)).result(SECONDS).answer.logits.shape == (1, 3)


def test_engine_refuses_logits_that_are_not_finite(engine: Engine, variant: ServedVariant, runner: GatedRunner) -> None:
    runner.gate.set()
    runner.value = float("nan")
    with pytest.raises(InferenceFailed):
        engine.submit(variant, images(1)).result(SECONDS)


def test_engine_stop_resolves_every_future_once(variant: ServedVariant, runner: GatedRunner) -> None:
    engine = Engine(max_batch_images=4)
    engine.start()
    running = engine.submit(variant, images(1))
    assert runner.started.wait(SECONDS)
    waiting: list[Future[Inference]] = [engine.submit(variant, images(1)) for _ in range(5)]
    stopping = threading.Thread(target=engine.stop, args=(SECONDS,))
    stopping.start()
    while not engine._is_stopping:
        pass
    runner.gate.set()
    stopping.join(SECONDS)
    assert running.result(SECONDS).answer.logits.shape == (1, 3)
    for future in waiting:
        with pytest.raises(ShuttingDown):
            future.result(SECONDS)
    with pytest.raises(ShuttingDown):
        engine.submit(variant, images(1))


def test_engine_is_not_responsive_while_a_run_lasts_too_long(variant: ServedVariant, runner: GatedRunner) -> None:
    now = 0.0
    engine = Engine(max_batch_images=4, clock=lambda: now)
    assert not engine.is_responsive(60)
    engine.start()
    assert engine.is_responsive(60)
    future = engine.submit(variant, images(1))
    assert runner.started.wait(SECONDS)
    now = 59.0
    assert engine.is_responsive(60)
    now = 61.0
    assert not engine.is_responsive(60)
    runner.gate.set()
    future.result(SECONDS)
    engine.stop(SECONDS)
    assert not engine.is_responsive(60)
