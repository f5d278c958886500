"""Problems: errors as HTTP responses.

RFC 9457 problem documents with `type`, `title`, `status`, `detail`, a stable `code`, and extension members.
Under `/v2` the format of the Open Inference Protocol: `{"error": "..."}`.
"""

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from app.errors import ServiceError, status_and_code

PROBLEM_MEDIA_TYPE = "application/problem+json"


def problem_document(error: ServiceError) -> dict[str, Any]:
    """Describe an error. The type is `about:blank`, so the title is the phrase of the status (RFC 9457, 4.2.1)."""
    status, code = status_and_code(error)
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Client Closed Request"
    base = {"type": "about:blank", "title": title, "status": status, "detail": error.detail, "code": code}
    return {**base, **error.members}


def problem_response(error: ServiceError, **members: Any) -> Response:
    """Render an error. The extra members belong to this response; several responses may share the error."""
    document = {**problem_document(error), **members}
    # ASCII only: a lone surrogate in client text cannot be encoded as UTF-8.
    content = json.dumps(document, ensure_ascii=True, allow_nan=False).encode("ascii")
    return Response(content, document["status"], headers=error.headers, media_type=PROBLEM_MEDIA_TYPE)


def protocol_error_response(error: ServiceError) -> Response:
    """Render an error for the Open Inference Protocol, which has only a text: what is accepted is appended to it."""
    known = {name: error.members.get(name) for name in ("accepted", "minimum", "maximum")}
    if isinstance(known["accepted"], list):
        known["accepted"] = ", ".join(map(str, known["accepted"]))
    text = " ".join([error.detail, *(f"{name.capitalize()}: {value}." for name, value in known.items() if value)])
    content = json.dumps({"error": text}, ensure_ascii=True).encode("ascii")
    # Exactly "application/json": KServe's client reads the text of no other type.
    return Response(content, status_and_code(error)[0], headers=error.headers, media_type="application/json")
