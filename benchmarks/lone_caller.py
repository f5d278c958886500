"""A lone caller: one connection, one request at a time, and what of its wait was decoding and inference."""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.served import MeasurementError

HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TIMING = re.compile(rb"\r\nserver-timing: *([^\r]*)", re.IGNORECASE)
STAGE = re.compile(rb"(\w+);dur=([0-9.]+)")
WORK = ("decode", "inference")
JPEG = {"Content-Type": "image/jpeg"}


@dataclass(frozen=True)
class Wait:
    """One request. Units: ms; work_ms: decoding and inference by the server's own clock, None where it does not say."""

    total_ms: float
    work_ms: float | None


def make_request(path: str, body: bytes, headers: Mapping[str, str] = JPEG) -> bytes:
    fields = {"Host": "127.0.0.1", **headers, "Content-Length": str(len(body))}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("ascii") + HEAD_END + body


def ask_alone(port: int, requests: Sequence[bytes], seconds: float) -> list[Wait]:
    """Ask again and again over one connection.

    Raises: MeasurementError at the first answer that is not 200.
    """
    waits = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        for request in itertools.cycle(requests):
            started_at = time.perf_counter()
            wire.sendall(request)
            head = _read_answer(wire)
            ended_at = time.perf_counter()
            if not head.startswith(b"HTTP/1.1 200 "):
                raise MeasurementError(f"port {port} answered {head[:100]!r}")
            waits.append(Wait((ended_at - started_at) * 1e3, read_work_ms(head)))
            if ended_at >= until:
                return waits
    return waits


def _read_answer(wire: socket.socket) -> bytes:
    """Read one answer to its last byte. Returns its head."""
    answer = b""
    while True:
        chunk = wire.recv(65536)
        if not chunk:
            raise MeasurementError(f"the server hung up after {answer[:100]!r}")
        answer += chunk
        head, end, body = answer.partition(HEAD_END)
        length = LENGTH.search(head)
        if end and length is None:
            raise MeasurementError(f"an answer without Content-Length: {head[:100]!r}")
        if end and length is not None and len(body) >= int(length[1]):
            return head


def read_work_ms(head: bytes) -> float | None:
    """Add up decoding and inference from Server-Timing."""
    timing = TIMING.search(head)
    stages = {name.decode(): float(value) for name, value in STAGE.findall(timing[1])} if timing else {}
    return sum(stages[name] for name in WORK) if all(name in stages for name in WORK) else None
