"""Exchanges: what every route that classifies does with a request, whatever protocol it came in."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from app.backends import Logits
from app.errors import ClientGone
from app.metrics import Exchange
from app.selection import Selection

T = TypeVar("T")


def note_variant(exchange: Exchange, chosen: Selection) -> None:
    """Write down what was chosen, for the metrics and the log."""
    exchange.model, exchange.version = chosen.model.manifest.name, chosen.model.manifest.version
    exchange.policy, exchange.r = chosen.policy, chosen.variant.label


async def read_body(request: Request) -> bytes:
    """Raises: ClientGone, BodyTooLarge."""
    try:
        return b"".join([chunk async for chunk in request.stream()])
    except ClientDisconnect as error:
        raise ClientGone("The caller left before the body was complete.") from error


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the caller leaves first; then drop what has not begun.

    Raises: ClientGone.
    """
    task, has_left = asyncio.current_task(), False
    assert task is not None

    async def leave() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    leaving = asyncio.ensure_future(leave())
    try:
        return await work
    except asyncio.CancelledError as error:
        if not has_left:
            raise  # the server ends
        task.uncancel()
        raise ClientGone("The caller left before the answer.") from error
    finally:
        leaving.cancel()


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Shapes: (..., classes)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def server_timing(exchange: Exchange) -> dict[str, str]:
    """Make the header that says how long each stage took. Units: ms."""
    return {"Server-Timing": ", ".join(f"{name};dur={value}" for name, value in exchange.durations_ms().items())}
