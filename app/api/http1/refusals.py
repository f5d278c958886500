"""Refusals: responses of the connection itself, to requests that do not reach the application."""

import asyncio
import logging
import secrets

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.api.boundary import render
from app.api.headers import with_headers
from app.errors import ServiceError, status_and_code
from app.observability.logs import with_fields

logger = logging.getLogger(__name__)


def write_refusal(
    error: ServiceError, head: bytes, transport: asyncio.Transport, default_headers: list[tuple[bytes, bytes]]
) -> None:
    """Write the error as a complete response that announces the end of the connection."""
    request_id = secrets.token_hex(16)
    status, code = status_and_code(error)
    logger.debug("refused connection", extra=with_fields(status=status, code=code, request_id=request_id))
    response: Response = render(error, _path(head), request_id)
    start = with_headers(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}, request_id
    )
    headers = [*default_headers, *start["headers"], (b"connection", b"close")]
    lines = [b"%s: %s\r\n" % header for header in headers]
    transport.write(b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)]))


def _path(head: bytes) -> str:
    """Read the path of a head that may be malformed: it chooses the format of the error."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    return words[1].partition(b"?")[0].decode("latin-1") if len(words) > 1 else ""
