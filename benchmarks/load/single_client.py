"""A single client: one connection, one request at a time."""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.errors import MeasurementError
from benchmarks.load.http1 import CONTENT_LENGTH, HEAD_END

SERVER_TIMING = re.compile(rb"\r\nserver-timing: *([^\r]*)", re.IGNORECASE)
STAGE = re.compile(rb"(\w+);dur=([0-9.]+)")
WORK = ("decode", "inference")


@dataclass(frozen=True)
class Latency:
    """One request. Units: ms. work_ms: decoding and inference as reported by the server, or None."""

    total_ms: float
    work_ms: float | None


def send_repeatedly(port: int, requests: Sequence[bytes], seconds: float) -> list[Latency]:
    """Send requests one after another over one connection.

    Raises: MeasurementError at the first response that is not 200.
    """
    latencies = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        for request in itertools.cycle(requests):
            started_at = time.perf_counter()
            connection.sendall(request)
            head = _read_response(connection)
            ended_at = time.perf_counter()
            if not head.startswith(b"HTTP/1.1 200 "):
                raise MeasurementError(f"port {port}: expected status 200, received {head[:100]!r}")
            latencies.append(Latency((ended_at - started_at) * 1e3, read_work_ms(head)))
            if ended_at >= until:
                return latencies
    return latencies


def _read_response(connection: socket.socket) -> bytes:
    """Read a whole response. Returns its head."""
    response = b""
    while True:
        chunk = connection.recv(65536)
        if not chunk:
            raise MeasurementError(f"the server closed the connection after {response[:100]!r}")
        response += chunk
        head, end, body = response.partition(HEAD_END)
        length = CONTENT_LENGTH.search(head)
        if end and length is None:
            raise MeasurementError(f"response without Content-Length: {head[:100]!r}")
        if end and length is not None and len(body) >= int(length[1]):
            return head


def read_work_ms(head: bytes) -> float | None:
    """Return the sum of decoding and inference from the Server-Timing header."""
    timing = SERVER_TIMING.search(head)
    stages = {name.decode(): float(value) for name, value in STAGE.findall(timing[1])} if timing else {}
    return sum(stages[name] for name in WORK) if all(name in stages for name in WORK) else None
