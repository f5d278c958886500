"""Timeouts: the bounds of a connection in time."""

from dataclasses import dataclass

from app.settings import Settings


@dataclass(frozen=True)
class Timeouts:
    """Bounds in time, beside uvicorn's `timeout_keep_alive` for idle connections. Units: seconds, bytes per second."""

    head: float
    body: float
    min_body_rate: float
    write: float


def read_timeouts(settings: Settings) -> Timeouts:
    return Timeouts(
        head=settings.head_timeout_seconds,
        body=settings.body_timeout_seconds,
        min_body_rate=settings.min_body_bytes_per_second,
        write=settings.write_timeout_seconds,
    )
