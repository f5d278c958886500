"""Encoding: bodies that are compressed on the wire, in either direction. Pure functions."""

import gzip
import re
import zlib

from app.errors import BodyTooLarge, MalformedBody, UnsupportedEncoding, echo

# What zlib calls the two containers; "deflate" is the one of RFC 1950, not the bare stream (RFC 9110, 8.4.1.2).
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
IDENTITY = "identity"
FASTEST = 1
NO_WEIGHT = re.compile(r"q=0(\.0{0,3})?")


def read_encoding(header: str | None) -> str:
    """Return how a body is encoded.

    Raises: UnsupportedEncoding.
    """
    encoding = (header or IDENTITY).strip().lower()
    if encoding not in (IDENTITY, *WINDOW_BITS):
        accepted = [*WINDOW_BITS, IDENTITY]
        raise UnsupportedEncoding(f"Content-Encoding: {echo(encoding)!r} is not read here.", accepted)
    return encoding


def decompress(body: bytes, encoding: str, max_body_bytes: int) -> bytes:
    """Undo an encoding, and stop at the cap: a few kilobytes can unfold to gigabytes.

    Raises: BodyTooLarge, MalformedBody.
    """
    if encoding == IDENTITY:
        return body
    stream = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = stream.decompress(body, max_body_bytes + 1)
    except zlib.error as error:
        raise MalformedBody(f"The body is not {encoding}, as its Content-Encoding says: {error}.") from error
    if len(plain) > max_body_bytes:
        detail = f"The body has more than {max_body_bytes} bytes once it is decompressed."
        raise BodyTooLarge(detail, max_body_bytes=max_body_bytes)
    if not stream.eof:
        raise MalformedBody(f"The body is cut off before the end of its {encoding} stream.")
    if stream.unused_data:
        raise MalformedBody(f"The body goes on for {len(stream.unused_data)} bytes behind its {encoding} stream.")
    return plain


def choose_encoding(accept: str | None) -> str:
    """Choose the first encoding that we write of those that a caller accepts; without the header, none."""
    for item in (accept or "").lower().split(","):
        name, _, weight = (part.strip() for part in item.partition(";"))
        if name in WINDOW_BITS and not NO_WEIGHT.fullmatch(weight):
            return name
    return IDENTITY


def compress(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body, FASTEST, mtime=0)
    return zlib.compress(body, FASTEST) if encoding == "deflate" else body
