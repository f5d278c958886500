"""An attack on a server, and what its other clients see meanwhile."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.integration.server import Server

POLL_SECONDS = 0.02


@dataclass
class Watch:
    """The slowest `/health/live` and the memory above rest, while it is entered. Units: seconds, bytes."""

    server: Server
    slowest_seconds: float = 0.0
    growth_bytes: int = 0
    _rest_bytes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._rest_bytes = self.server.resident_bytes
        # Resets the peak.
        self._proc("clear_refs").write_text("5", encoding="ascii")
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        status = self._proc("status").read_text(encoding="ascii")
        peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        self.growth_bytes = int(peak_kb) * 1024 - self._rest_bytes

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.server.process.pid}/{name}")

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            started_at = time.monotonic()
            assert self.server.ask("GET", "/health/live")[0] == 200
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started_at)


def send_together(requests: Sequence[Callable[[], int]]) -> list[int]:
    """Send requests at the same time, each on its own connection. Returns their statuses."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return [done.result() for done in [pool.submit(request) for request in requests]]
