"""A server under measurement: a process of its own, from the first answer that it is ready to its end."""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.05  # a server that uses no CPU for as long is idle: the kernel counts in ticks of 10 ms
MAX_LOOKS = 400
N_LAST_LINES = 20
OWN_SETTINGS = ("host", "port", "model_store")
ANNOUNCEMENT = re.compile(r"http://127\.0\.0\.1:(\d+)")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class MeasurementError(Exception):
    """What was to be measured could not be, and a figure would mislead; the message is for the one who asked."""


class Served:
    """A process that listens on a port of its own choice and announces it; as a context it is started, awaited, and
    ended.
    """

    def __init__(self, command: Sequence[str], ready_path: str, log: Path, environment: Mapping[str, str]) -> None:
        self.port = 0
        self._ready_path, self._log = ready_path, log
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises: MeasurementError with the end of its log, if it does not become ready."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._status() != 200:
            self.require_running()
            if time.monotonic() > deadline:
                raise MeasurementError(f"{' '.join(self._command)} did not become ready:\n{self.last_words}")
            time.sleep(LOOK_SECONDS)

    @contextmanager
    def expected_to_listen(self) -> Iterator[None]:
        """Say what became of the server where a client finds that nobody listens.

        Raises: MeasurementError.
        """
        try:
            yield
        except OSError as error:
            self.require_running()
            raise MeasurementError(f"{' '.join(self._command)} does not listen: {error}") from error

    def _status(self) -> int:
        announced = ANNOUNCEMENT.search(self._log.read_text(errors="replace"))
        if announced is None:
            return 0
        self.port = int(announced[1])
        try:
            return self.get(self._ready_path)[0]
        except (OSError, http.client.HTTPException):
            return 0

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def hang_up(self) -> None:
        """Send SIGHUP, at which the service looks for new versions."""
        self.process.send_signal(signal.SIGHUP)

    @property
    def last_words(self) -> str:
        """Return the end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-N_LAST_LINES:])

    @property
    def cpu_seconds(self) -> float:
        """Return what all its threads have used."""
        user, system = self._read("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / CLOCK_TICKS

    @property
    def resident_bytes(self) -> int:
        self.require_running()
        return read_resident_bytes(self.process.pid)

    def require_running(self) -> None:
        """Raises: MeasurementError with the end of its log, if the process has ended."""
        if self.process.poll() is not None:
            code = self.process.returncode
            raise MeasurementError(f"{' '.join(self._command)} ended with {code}:\n{self.last_words}")

    def _read(self, name: str) -> str:
        self.require_running()
        return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="ascii")

    def settle(self) -> None:
        """Wait until it has finished what callers who left had asked for, or it would spoil what comes next.

        Raises: MeasurementError if it does not come to rest.
        """
        for _ in range(MAX_LOOKS):
            before = self.cpu_seconds
            time.sleep(LOOK_SECONDS)
            if self.cpu_seconds == before:
                return
        raise MeasurementError(f"{' '.join(self._command)} is busy though nobody asks it anything")


def serve_store(store: Path, log: Path, settings: Mapping[str, str]) -> Served:
    """Make the service on a model store; `settings` are `DTEM_` variables without the prefix, in any case."""
    chosen = {"port": "0", "model_store": str(store), **settings}
    variables = {f"DTEM_{name.upper()}": value for name, value in chosen.items()}
    return Served([sys.executable, "-m", "app"], "/health/ready", log, clean_environment() | variables)


def serve_module(module: str, arguments: Mapping[str, object], ready_path: str, log: Path) -> Served:
    """Make `python -m <module> --port 0 --<name> <value> …`."""
    named = [part for name, value in {"port": 0, **arguments}.items() for part in (f"--{name}", str(value))]
    return Served([sys.executable, "-m", module, *named], ready_path, log, clean_environment())


def read_resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def clean_environment() -> dict[str, str]:
    """Return ours without the settings of a service that somebody may have set in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DTEM_")}


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


def add_setting_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--setting",
        type=read_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the service, e.g. max_batch_images=16; may be repeated",
    )


def read_setting(text: str) -> tuple[str, str]:
    """Raises: argparse.ArgumentTypeError for what is no setting, or one that the benchmark makes itself."""
    name, equals, value = text.partition("=")
    name = name.strip().lower().removeprefix("dtem_")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, e.g. max_batch_images=16")
    if name in OWN_SETTINGS:
        raise argparse.ArgumentTypeError(f"{name} is chosen by the benchmark, as are {', '.join(OWN_SETTINGS)}")
    return name, value.strip()
