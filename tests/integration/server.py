"""The service as a real process, and requests to it."""

import http.client
import re
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.local.process import ServiceProcess

ROOT = Path(__file__).parents[2]
# For modules whose tests hold for a single process and for a Ray cluster.
on_both = pytest.mark.parametrize("server", ["process", "ray"], indirect=True)
WAIT_SECONDS = 60.0


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Address(ABC):
    """A port of this machine at which the service listens."""

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
        """Send one request on a new connection."""
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
        """Send one request on a new connection. Returns status and body."""
        status, _, answer = self.request(method, path, body, headers)
        return status, answer

    def series(self, metric: str) -> list[float]:
        """Read the values of a metric for all labels. The name may be a regular expression with some of them."""
        text = self.ask("GET", "/metrics")[1].decode()
        return [float(value) for value in re.findall(rf"^{metric}(?:{{.*}})? (\S+)$", text, re.MULTILINE)]


class Server(ServiceProcess, Address):
    """`python -m app` on a free port."""

    def __init__(self, model_store: Path, log: Path, /, tmpdir: Path | None = None, **settings: object) -> None:
        super().__init__(model_store, log, settings, tmpdir)
        self._certificate = settings.get("tls_certificate")

    @property
    def announcement(self) -> str:
        return self.output

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
