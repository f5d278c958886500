"""Logs: one record per line on stderr, as a JSON object or plain text, with the id of its request.

Control characters are escaped, so that client input cannot start a line.
"""

import json
import logging
import re
import secrets
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from starlette.types import Scope

VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
# Attribute of a log record.
FIELDS = "fields"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# ASCII only: no line separators, no unpaired surrogates.
ENCODER = json.JSONEncoder(ensure_ascii=True, default=str)
# Libraries that log malformed client input.
NOISY = ("PIL", "python_multipart")

logger = logging.getLogger(__name__)


def configure_logs(level: str, log_format: Literal["json", "text"]) -> None:
    """Send all log records, warnings and uncaught exceptions of the process to stderr, in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.excepthook = _log_crash
    threading.excepthook = _log_thread_crash


def name_request(scope: Scope) -> str:
    """Return the client's `X-Request-ID` if it is valid, else a new id, and set it for this context's log lines."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    request_id = given.decode("ascii") if VALID_ID.fullmatch(given) else secrets.token_hex(16)
    REQUEST_ID.set(request_id)
    return request_id


def with_fields(**fields: Any) -> dict[str, dict[str, Any]]:
    """Make the `extra` argument of a log call: additional fields of the line.

    A thread that works for several requests has no request id in its context, so it passes theirs:
    `logger.exception("…", extra=with_fields(request_ids=[…]))`.
    """
    return {FIELDS: fields}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": _format_time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            document["request_id"] = request_id
        document |= {name: value for name, value in getattr(record, FIELDS, {}).items() if name not in document}
        if exception := _format_exception(self, record):
            document["exception"] = exception
        return ENCODER.encode(document)


class TextFormatter(logging.Formatter):
    """Indents tracebacks, so that none of their lines looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        name = record.name if request_id is None else f"{record.name} [{request_id}]"
        fields = "".join(f" {key}={value}" for key, value in getattr(record, FIELDS, {}).items())
        head = _escape(f"{_format_time(record)} {record.levelname} {name}: {record.getMessage()}{fields}")
        lines = _format_exception(self, record).split("\n")
        return "\n    ".join([head, *(_escape(line) for line in lines if line)])


def _format_time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _format_exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    return "\n".join([*parts, *([formatter.formatStack(record.stack_info)] if record.stack_info else [])])


def _escape(text: str) -> str:
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def _log_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logger.critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_thread_crash(crash: threading.ExceptHookArgs) -> None:
    if crash.exc_value is not None:
        name = crash.thread.name if crash.thread else "?"
        logger.critical(
            "uncaught exception in thread %s", name, exc_info=(crash.exc_type, crash.exc_value, crash.exc_traceback)
        )
