"""HTTP/1.1 messages as bytes, for clients that must cost little CPU time."""

from __future__ import annotations

import re
from collections.abc import Mapping

HEAD_END = b"\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
JPEG = {"Content-Type": "image/jpeg"}


def make_request(path: str, body: bytes, headers: Mapping[str, str] = JPEG) -> bytes:
    """Return a POST request."""
    fields = {"Host": "127.0.0.1", **headers, "Content-Length": str(len(body))}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("ascii") + HEAD_END + body
