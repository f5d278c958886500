"""Server processes: start, wait until ready, observe, stop."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02
# The kernel counts CPU time in ticks of 10 ms. A server that uses none for this long is idle.
IDLE_SECONDS = 0.05
MAX_IDLE_CHECKS = 400
N_LOG_LINES = 20
ANNOUNCEMENT = re.compile(r"(?:ready:|running on) https?://127\.0\.0\.1:(\d+)\b")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class LaunchError(Exception):
    """A server did not start, or did not keep running. The message ends with its last log lines."""


class ServerProcess:
    """A server that chooses a free port and prints its address when it is ready.

    As a context manager: entering starts it and waits until it is ready, leaving kills it. Its
    stderr is written to `log`, its stdout to a file of the same name with `.out` appended.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.port = 0
        self._command, self._environment = command, environment
        self._log, self._output = log, log.with_name(f"{log.name}.out")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises: LaunchError if the server does not become ready."""
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment, stdout=output, stderr=log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while (announced := ANNOUNCEMENT.search(self.output + self.log)) is None:
            self.require_running()
            if time.monotonic() > deadline:
                raise LaunchError(f"{self} was not ready after {START_SECONDS:g} s:\n{self.log_tail}")
            time.sleep(POLL_SECONDS)
        self.port = int(announced[1])

    def __str__(self) -> str:
        return " ".join(self._command)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started: use it in a `with` statement")
        return self._process

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def log_tail(self) -> str:
        return "\n".join(self.log.splitlines()[-N_LOG_LINES:])

    @property
    def cpu_seconds(self) -> float:
        """CPU time used by all threads, in user and kernel mode."""
        self.require_running()
        status = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        user, system = status.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / CLOCK_TICKS

    @property
    def resident_bytes(self) -> int:
        self.require_running()
        return read_resident_bytes(self.process.pid)

    def require_running(self) -> None:
        """Raises: LaunchError if the process has ended."""
        if self.process.poll() is not None:
            raise LaunchError(f"{self} ended with status {self.process.returncode}:\n{self.log_tail}")

    @contextmanager
    def expected_to_listen(self) -> Iterator[None]:
        """Translate connection errors of a client.

        Raises: LaunchError for an OSError in the block.
        """
        try:
            yield
        except OSError as error:
            self.require_running()
            raise LaunchError(f"{self} does not accept connections: {error}") from error

    def wait_until_idle(self) -> None:
        """Wait until requests of clients that have disconnected are finished.

        Raises: LaunchError if the server stays busy.
        """
        for _ in range(MAX_IDLE_CHECKS):
            before = self.cpu_seconds
            time.sleep(IDLE_SECONDS)
            if self.cpu_seconds == before:
                return
        raise LaunchError(f"{self} still uses CPU time {MAX_IDLE_CHECKS * IDLE_SECONDS:g} s after the last request")

    def get(self, path: str) -> tuple[int, bytes]:
        """Send one GET request. Returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def reload(self) -> None:
        """Send SIGHUP. The service then scans its model store."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self, number: int = signal.SIGTERM, timeout_seconds: float = STOP_SECONDS) -> int:
        """Send a signal and wait. Returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_seconds)


class ServiceProcess(ServerProcess):
    """`python -m app` on a model store and a free port.

    settings: names of `DTEM_` variables without the prefix, in any case.
    """

    def __init__(
        self, model_store: Path, log: Path, settings: Mapping[str, object], tmpdir: Path | None = None
    ) -> None:
        variables = environment(**{"port": 0, "model_store": model_store, **settings})
        if tmpdir is not None:
            variables["TMPDIR"] = str(tmpdir)
        super().__init__([sys.executable, "-m", "app"], log, variables)


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of this process with these settings of the service and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DTEM_")}
    return inherited | {f"DTEM_{name.upper()}": str(value) for name, value in settings.items()}


def read_resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
