"""A real server process, started as an operator would."""

import http.client
import os
import re
import select
import signal
import ssl
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from benchmarks.served import read_resident_bytes

ROOT = Path(__file__).parents[2]
on_both = pytest.mark.parametrize("server", ["process", "ray"], indirect=True)  # the contract is the same
WAIT_SECONDS = 60.0
START_SECONDS = 60.0  # what a busy machine may take; how long it should take is a test of its own


def environment(**settings: object) -> dict[str, str]:
    """Make the environment of a server, with no setting but these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DTEM_")}
    return inherited | {f"DTEM_{name.upper()}": str(value) for name, value in settings.items()}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Address(ABC):
    """A port of this machine at which the service answers, whoever listens there."""

    port: int

    @property
    @abstractmethod
    def log(self) -> str: ...

    @property
    @abstractmethod
    def resident_bytes(self) -> int: ...

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request on a connection of its own."""
        connection = self._connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own. Returns status and body."""
        status, _, answer = self.request(method, path, body, headers)
        return status, answer

    def series(self, metric: str) -> list[float]:
        """Read the values of a metric, whatever its labels; the name may be a pattern with some of them."""
        text = self.ask("GET", "/metrics")[1].decode()
        return [float(value) for value in re.findall(rf"^{metric}(?:{{.*}})? (\S+)$", text, re.MULTILINE)]


class Server(Address):
    """`python -m app` on a free port, until the block is left."""

    def __init__(self, model_store: Path, log: Path, tmpdir: Path | None = None, **settings: object) -> None:
        self._log = log
        self._certificate = settings.get("tls_certificate")
        variables = environment(**{"port": 0, "model_store": model_store, **settings})
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app"],
                cwd=ROOT,
                env=variables | ({"TMPDIR": str(tmpdir)} if tmpdir else {}),
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.announcement = ""
        self.port = 0

    def __enter__(self) -> Self:
        """Wait until it says that it is ready."""
        try:
            self.announcement = self._read_announcement()
            self.port = int(re.findall(r"ready: https?://127\.0\.0\.1:(\d+)", self.announcement)[0])
        except BaseException:
            self.process.kill()
            raise
        return self

    def _read_announcement(self) -> str:
        assert self.process.stdout is not None
        deadline, text = time.monotonic() + START_SECONDS, b""
        while b"/metrics\n" not in text:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, left))
            chunk = os.read(self.process.stdout.fileno(), 4096) if readable else b""
            assert chunk, f"the server did not start:\n{self.log}"
            text += chunk
        return text.decode()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def resident_bytes(self) -> int:
        return read_resident_bytes(self.process.pid)

    @property
    def cpu_seconds(self) -> float:
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").split()[13:15]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: int = signal.SIGTERM, timeout_seconds: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_seconds)

    def _connect(self) -> http.client.HTTPConnection:
        if self._certificate is None:
            return super()._connect()
        context = ssl.create_default_context(cafile=str(self._certificate))
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
