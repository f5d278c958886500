import threading
import weakref
from typing import Any

import pytest

from app.store import release
from app.store.release import return_when_released


class Runner:
    def run(self, pixels: Any) -> Any:
        raise NotImplementedError


class Steps(threading.Event):
    """An event whose waits take no time: each drops what a request in flight holds, if it is its turn."""

    def __init__(self, held: list[Runner], released_at: int) -> None:
        super().__init__()
        self.held, self.released_at, self.n_waits = held, released_at, 0

    def wait(self, timeout: float | None = None) -> bool:
        self.n_waits += 1
        if self.n_waits == self.released_at:
            self.held.clear()
        return self.is_set()


def run(monkeypatch: pytest.MonkeyPatch, released_at: int, n_waits: int = 5) -> list[bool]:
    """Return whether the graph was in memory whenever memory was returned."""
    held = [Runner()]
    dropped: list[weakref.ref[Any]] = [weakref.ref(held[0])]
    seen: list[bool] = []
    monkeypatch.setattr(release, "return_freed_memory", lambda: seen.append(dropped[0]() is not None))
    return_when_released(dropped, Steps(held, released_at), [1.0] * n_waits)
    return seen


def test_memory_is_returned_again_after_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run(monkeypatch, released_at=3)
    assert seen == [True, True, False]


def test_graph_that_stays_in_memory_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = run(monkeypatch, released_at=99, n_waits=2)
    assert seen == [True, True]
    assert caplog.messages == ["dropped graphs still in memory after 2 s: 1"]


def test_stopping_service_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps([], released_at=0)
    steps.set()
    monkeypatch.setattr(release, "return_freed_memory", lambda: pytest.fail("returned memory while stopping"))
    return_when_released([], steps)
    assert steps.n_waits == 1
