"""Boundary: the middleware that every request and response passes.

It assigns the request id, checks the API key, renders errors, and records metrics, logs and traces.
"""

import asyncio
import logging
import re
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.headers import with_headers
from app.api.inference import RECORD
from app.api.keys import Keys
from app.api.problems import problem_response, protocol_error_response
from app.errors import (
    PROBLEMS,
    InternalError,
    InvalidParameter,
    MalformedRequest,
    MethodNotAllowed,
    ServiceError,
    ShuttingDown,
    Unauthorized,
    UnknownPath,
    echo,
    status_and_code,
)
from app.observability.logs import name_request, with_fields
from app.observability.metrics import Metrics
from app.observability.record import RequestRecord

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

logger = logging.getLogger(__name__)

PROTOCOL_PREFIX = "/v2"
# Key in the ASGI scope with which a server can set the arrival time. Units: seconds of time.perf_counter.
STARTED_AT = "dtem.started_at"
UNAUTHORIZED = PROBLEMS[Unauthorized]


class Boundary:
    """Pure ASGI middleware. Only requests to inference paths are counted."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: Keys,
        tracing: "Tracing | None",
        inference_paths: Collection[re.Pattern[str]],
    ) -> None:
        self._app, self._metrics, self._keys, self._tracing = app, metrics, keys, tracing
        self._inference_paths = inference_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = scope.get(STARTED_AT, time.perf_counter())
        record = scope[RECORD] = RequestRecord(name_request(scope), started_at)
        # The server omits the body of a HEAD response: it reads its own scope, not this copy.
        app_scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = await self._respond(app_scope, receive, send, record)
        ended_at = time.perf_counter()
        is_inference = any(path.fullmatch(scope["path"]) for path in self._inference_paths)
        if is_inference:
            self._metrics.observe(record, status)
        elif status == UNAUTHORIZED[0]:
            self._metrics.count_refusal(UNAUTHORIZED[1])
        trace_id = None if self._tracing is None else self._tracing.record(scope, record, status, ended_at)
        is_notable = is_inference or status == UNAUTHORIZED[0]
        _log(logging.INFO if is_notable else logging.DEBUG, scope, record, status, ended_at, trace_id)

    async def _respond(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> int:
        """Run the application, and render the error that it raises. Returns the status."""
        status = 0

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = with_headers(message, record.request_id)
            await send(message)

        try:
            self._keys.require(scope)
            await self._app(scope, receive, send_recorded)
        except (Exception, asyncio.CancelledError) as error:
            known = _translate(error)
            if status:
                # The response has begun: only closing the connection can signal the error.
                raise
            record.refusals.append(status_and_code(known)[1])
            await render(known, scope["path"], record.request_id)(scope, receive, send_recorded)
        return status


def _translate(error: BaseException) -> ServiceError:
    """Translate an exception. Only the server cancels a request, at the end of the drain."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return ShuttingDown("The service shut down before the request completed.", retry_after_seconds=1)
    logger.error("unexpected error", exc_info=error)
    return InternalError()


def render(error: ServiceError, path: str, request_id: str) -> Response:
    """Render an error in the format of its path: that of the protocol under `/v2`, else a problem document."""
    is_protocol = path == PROTOCOL_PREFIX or path.startswith(PROTOCOL_PREFIX + "/")
    return protocol_error_response(error) if is_protocol else problem_response(error, request_id=request_id)


def _log(level: int, scope: Scope, record: RequestRecord, status: int, ended_at: float, trace_id: str | None) -> None:
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": echo(scope["method"]),
        "path": echo(scope["path"]),
        "status": status,
        **record.facts(),
    }
    if record.refusals:
        fields["refusals"] = record.refusals
    if trace_id is not None:
        fields["trace_id"] = trace_id
    stages = {f"{name}_ms": round(sum(times) * 1e3, 3) for name, times in record.stages.items() if times}
    stages["duration_ms"] = round((ended_at - record.started_at) * 1e3, 3)
    logger.log(level, "request", extra=with_fields(**fields, **stages))


def translate_framework_errors(app: FastAPI) -> None:
    """Translate the errors of the framework, so that the boundary renders all errors alike."""

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> NoReturn:
        path = echo(request.url.path)
        if error.status_code == 404:
            raise UnknownPath(f"No such path: {path!r}.") from error
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow")
            detail = f"Method {echo(request.method)} is not allowed for {path!r}."
            raise MethodNotAllowed(detail, allow=allow) from error
        raise MalformedRequest(error.detail) from error

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> NoReturn:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        raise InvalidParameter(f"{field}: {first['msg']}", field=field) from error
