"""Boundary: every answer leaves through here. Errors become problem documents, or under `/v2` what its protocol says;
requests that classify are counted and logged.
"""

import logging
import re
from typing import NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import (
    InternalError,
    InvalidParameter,
    MalformedRequest,
    MethodNotAllowed,
    ServiceError,
    UnknownPath,
    echo,
    problem_response,
    protocol_error_response,
    status_and_code,
)
from app.metrics import Exchange, Metrics

logger = logging.getLogger(__name__)

CLASSIFY_PATH = "/classify"
PROTOCOL_PREFIX = "/v2"
CLASSIFYING = re.compile(r"/classify|/v2/models/[^/]+(/versions/[^/]+)?/infer")  # counted; `Exchange` tells of these
EXCHANGE = "dtem.exchange"  # key in the ASGI scope


class Boundary:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange()
        path: str = scope["path"]
        if scope["method"] == "HEAD":  # the server leaves the body out; it looks at its own scope, not at this copy
            scope = {**scope, "method": "GET"}
        status = await self._answer(scope, receive, send, exchange)
        if CLASSIFYING.fullmatch(path):
            self._metrics.observe(exchange, status)
            _log(path.rpartition("/")[2], exchange, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> int:
        """Let the application answer, or answer for it. Returns the status."""
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("unexpected error")
            if status:  # half an answer is out: only a broken connection can tell
                raise
            known = error if isinstance(error, ServiceError) else InternalError()
            exchange.refusals.append(status_and_code(known)[1])
            await _render(known, scope["path"])(scope, receive, send_noting_status)
        return status


def _render(error: ServiceError, path: str) -> Response:
    is_protocol = path == PROTOCOL_PREFIX or path.startswith(PROTOCOL_PREFIX + "/")
    return protocol_error_response(error) if is_protocol else problem_response(error)


def _log(verb: str, exchange: Exchange, status: int) -> None:
    model, policy, r = exchange.variant
    variant = f"model={model} policy={policy} r={r}"
    stages = " ".join(f"{name}_ms={value}" for name, value in exchange.durations_ms().items())
    reasons = f" refused={','.join(exchange.refusals)}" if exchange.refusals else ""
    logger.info("%s %d %s images=%d %s%s", verb, status, variant, exchange.n_images, stages, reasons)


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
