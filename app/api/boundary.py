"""Boundary: every request comes in and every answer leaves through here. A request gets its id and shows its key;
errors become problem documents, or under `/v2` what its protocol says; requests that classify are counted and logged;
what was traced is sent.
"""

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.headers import with_headers
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
    problem_response,
    protocol_error_response,
    status_and_code,
)
from app.keys import Keys
from app.logs import name_request, with_fields
from app.metrics import Exchange, Metrics

if TYPE_CHECKING:
    from app.tracing import Tracing

logger = logging.getLogger(__name__)

CLASSIFY_PATH = "/classify"
PROTOCOL_PREFIX = "/v2"
CLASSIFYING = re.compile(r"/classify|/v2/models/[^/]+(/versions/[^/]+)?/infer")
EXCHANGE = "dtem.exchange"  # key in the ASGI scope
STARTED_AT = "dtem.started_at"  # the same, of a server that knows better than we when the request came: perf_counter
UNAUTHORIZED = PROBLEMS[Unauthorized]


class Boundary:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Keys, tracing: "Tracing | None") -> None:
        self._app, self._metrics, self._keys, self._tracing = app, metrics, keys, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = scope.get(STARTED_AT, time.perf_counter())
        exchange = scope[EXCHANGE] = Exchange(name_request(scope), started_at)
        # Of HEAD the server leaves the body out: it looks at its own scope, not at this copy.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = await self._answer(asked, receive, send, exchange)
        ended_at = time.perf_counter()
        if CLASSIFYING.fullmatch(scope["path"]):
            self._metrics.observe(exchange, status)
        elif status == UNAUTHORIZED[0]:
            self._metrics.count_refusal(UNAUTHORIZED[1])
        trace_id = None if self._tracing is None else self._tracing.record(scope, exchange, status, ended_at)
        _log(scope, exchange, status, ended_at, trace_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> int:
        """Let the application answer, or answer for it. Returns the status."""
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = with_headers(message, exchange.request_id)
            await send(message)

        try:
            self._keys.require(scope)
            await self._app(scope, receive, send_noting_status)
        except (Exception, asyncio.CancelledError) as error:
            known = _translate(error)
            if status:  # half an answer is out: only a broken connection can tell
                raise
            exchange.refusals.append(status_and_code(known)[1])
            await render(known, scope["path"], exchange.request_id)(scope, receive, send_noting_status)
        return status


def _translate(error: BaseException) -> ServiceError:
    """Find the words for an error; a request is cancelled by the server alone, at the end of draining."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return ShuttingDown("The service ended before the answer was there.", retry_after_seconds=1)
    logger.error("unexpected error", exc_info=error)
    return InternalError()


def render(error: ServiceError, path: str, request_id: str) -> Response:
    """Write an error down as those who ask under its path expect it."""
    is_protocol = path == PROTOCOL_PREFIX or path.startswith(PROTOCOL_PREFIX + "/")
    return protocol_error_response(error) if is_protocol else problem_response(error, request_id=request_id)


def _log(scope: Scope, exchange: Exchange, status: int, ended_at: float, trace_id: str | None) -> None:
    is_notable = CLASSIFYING.fullmatch(scope["path"]) or status == UNAUTHORIZED[0]
    level = logging.INFO if is_notable else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": echo(scope["method"]),
        "path": echo(scope["path"]),
        "status": status,
        **exchange.facts(),
    }
    if exchange.refusals:
        fields["refusals"] = exchange.refusals
    if trace_id is not None:
        fields["trace_id"] = trace_id
    stages = {f"{name}_ms": round(sum(times) * 1e3, 3) for name, times in exchange.stages.items() if times}
    stages["duration_ms"] = round((ended_at - exchange.started_at) * 1e3, 3)
    logger.log(level, "request", extra=with_fields(**fields, **stages))


def translate_framework_errors(app: FastAPI) -> None:
    """Turn the framework's own refusals into ours, so that there is one way out for all of them."""

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> NoReturn:
        path = echo(request.url.path)
        if error.status_code == 404:
            raise UnknownPath(f"There is nothing at {path!r}.") from error
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow")
            raise MethodNotAllowed(f"{path!r} does not answer {echo(request.method)}.", allow=allow) from error
        raise MalformedRequest(error.detail) from error

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> NoReturn:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        raise InvalidParameter(f"{field}: {first['msg']}", field=field) from error
