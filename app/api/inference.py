"""Inference: helpers shared by all routes that run a model, in any protocol and for any task."""

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from app.errors import ClientGone, InvalidParameter
from app.observability.record import RequestRecord
from app.store.manifest import Manifest
from app.store.selection import Selection

# Marks a route that runs a model, in its `openapi_extra`. Its requests are counted and logged.
INFERENCE = {"x-inference": True}
# Key in the ASGI scope: the request's record.
RECORD = "dtem.record"

T = TypeVar("T")


class PlainRoute(APIRoute):
    """A route without dependencies, whose endpoint reads the request itself. Resolving none would take 0.05 ms."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def inference_paths(routes: Iterable[BaseRoute]) -> list[re.Pattern[str]]:
    """List the paths of the routes that are marked with `INFERENCE`."""
    marked = [route for route in routes if isinstance(route, APIRoute) and route.openapi_extra]
    return [route.path_regex for route in marked if (route.openapi_extra or {}).items() >= INFERENCE.items()]


def require_task(chosen: Selection, task: str) -> None:
    """Raises: InvalidParameter for a model of another task."""
    manifest = chosen.model.manifest
    if manifest.task != task:
        detail = f"Model {manifest.name!r} is for task {manifest.task!r}; expected a model for {task!r}."
        raise InvalidParameter(detail, field="model", value=manifest.name, task=manifest.task, accepted=[task])


def note_selection(record: RequestRecord, chosen: Selection) -> None:
    """Record what was selected, for the metrics and the log."""
    record.model, record.version = chosen.model.manifest.name, chosen.model.manifest.version
    record.policy, record.r = chosen.policy, chosen.variant.rate_label


async def read_body(request: Request) -> bytes:
    """Raises: ClientGone, BodyTooLarge."""
    try:
        return b"".join([chunk async for chunk in request.stream()])
    except ClientDisconnect as error:
        raise ClientGone("The client disconnected before the body was complete.") from error


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, and cancel it if the client disconnects first.

    Raises: ClientGone.
    """
    task, has_disconnected = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal has_disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_disconnected = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError as error:
        if not has_disconnected:
            # The server is shutting down.
            raise
        task.uncancel()
        raise ClientGone("The client disconnected before the response.") from error
    finally:
        watching.cancel()


def probabilities_of(logits: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float64]:
    """Apply the model's activation. Shapes: (..., classes)."""
    if manifest.output.activation == "sigmoid":
        # 1 / (1 + exp(-x)) would overflow.
        return np.asarray(np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))))
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def server_timing(record: RequestRecord) -> dict[str, str]:
    """Make the Server-Timing header. Units: ms."""
    return {"Server-Timing": ", ".join(f"{name};dur={value}" for name, value in record.durations_ms().items())}
