"""Encoding: compressed request and response bodies. Pure functions."""

import gzip
import re
import zlib

from app.errors import BodyTooLarge, MalformedBody, UnsupportedEncoding, echo

# `wbits` of zlib. HTTP's "deflate" is the zlib format of RFC 1950, not a bare stream (RFC 9110, 8.4.1.2).
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
IDENTITY = "identity"
FASTEST = 1
ZERO_WEIGHT = re.compile(r"q=0(\.0{0,3})?")


def read_encoding(header: str | None) -> str:
    """Return the encoding of a body.

    Raises: UnsupportedEncoding.
    """
    encoding = (header or IDENTITY).strip().lower()
    if encoding not in (IDENTITY, *WINDOW_BITS):
        accepted = [*WINDOW_BITS, IDENTITY]
        raise UnsupportedEncoding(f"Unsupported Content-Encoding {echo(encoding)!r}.", accepted)
    return encoding


def decompress(body: bytes, encoding: str, max_body_bytes: int) -> bytes:
    """Decompress a body, at most to the limit: a few kilobytes can expand to gigabytes.

    Raises: BodyTooLarge, MalformedBody.
    """
    if encoding == IDENTITY:
        return body
    stream = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = stream.decompress(body, max_body_bytes + 1)
    except zlib.error as error:
        raise MalformedBody(f"Request body is not valid {encoding}: {error}.") from error
    if len(plain) > max_body_bytes:
        detail = f"Decompressed request body exceeds {max_body_bytes} bytes."
        raise BodyTooLarge(detail, max_body_bytes=max_body_bytes)
    if not stream.eof:
        raise MalformedBody(f"Request body is a truncated {encoding} stream.")
    if stream.unused_data:
        raise MalformedBody(f"Request body has {len(stream.unused_data)} bytes after its {encoding} stream.")
    return plain


def choose_encoding(accept: str | None) -> str:
    """Choose the first supported encoding that the client accepts; identity without the header."""
    for item in (accept or "").lower().split(","):
        name, _, weight = (part.strip() for part in item.partition(";"))
        if name in WINDOW_BITS and not ZERO_WEIGHT.fullmatch(weight):
            return name
    return IDENTITY


def compress(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body, FASTEST, mtime=0)
    return zlib.compress(body, FASTEST) if encoding == "deflate" else body
