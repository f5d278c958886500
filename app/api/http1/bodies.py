"""Bodies: where the body of a request ends. Pure functions of the bytes, which may be split anywhere."""

import re
from typing import Protocol

from app.api.http1.heads import BARE_LF, LINE_END
from app.errors import HeadersTooLarge, MalformedRequest

# A line with the size of a chunk and its extensions, or a trailer.
MAX_LINE_BYTES = 4096
MAX_TRAILER_BYTES = 16_384
# Bytes that frame a body: what is allowed in any case, and for each byte of the body. Chunks of one byte take five.
MAX_FRAMING_BYTES, MAX_FRAMING_RATIO = 16_384, 8

# Every few bytes may be a chunk.
MIN_TURN_BYTES = 4096

SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")
TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")


class BodyReader(Protocol):
    is_complete: bool

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return bytes of the body, and what follows its end.

        Raises: MalformedRequest, HeadersTooLarge.
        """
        ...

    @property
    def n_left(self) -> int | None:
        """The number of bytes that are still to come; None if it is unknown."""
        ...

    @property
    def n_per_turn(self) -> int:
        """The number of bytes to read before other connections get their turn."""
        ...


class LengthReader:
    """A body of known length."""

    def __init__(self, length: int) -> None:
        self._n_left = length
        self.is_complete = not length

    @property
    def n_left(self) -> int:
        return self._n_left

    @property
    def n_per_turn(self) -> int:
        return self._n_left

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return bytes of the body, and what follows its end."""
        body, rest = (data, b"") if len(data) <= self._n_left else (data[: self._n_left], data[self._n_left :])
        self._n_left -= len(body)
        self.is_complete = not self._n_left
        return body, rest


class ChunkedReader:
    """A chunked body (RFC 9112, 7.1). Extensions and trailers are checked, bounded and dropped."""

    n_left = None

    def __init__(self) -> None:
        self.is_complete = False
        self._line = b""
        self._n_left_of_chunk = 0
        self._is_after_chunk = self._is_in_trailers = False
        self._n_body = self._n_framing = self._n_trailers = 0

    @property
    def n_per_turn(self) -> int:
        return max(MIN_TURN_BYTES, self._n_left_of_chunk)

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return bytes of the body, and what follows its end.

        Raises: MalformedRequest, HeadersTooLarge.
        """
        data, self._line = self._line + data, b""
        pieces, at = [], 0
        while at < len(data) and not self.is_complete:
            if self._n_left_of_chunk:
                piece = data[at : at + self._n_left_of_chunk]
                pieces.append(piece)
                at += len(piece)
                self._n_left_of_chunk -= len(piece)
                continue
            end = data.find(LINE_END, at, at + MAX_LINE_BYTES)
            if end < 0:
                self._keep(data[at:])
                at = len(data)
                break
            self._n_framing += end - at + len(LINE_END)
            if not self._is_after_chunk:
                self._read_line(data[at:end])
            elif end > at:
                raise MalformedRequest("A chunk is longer than its size.")
            else:
                self._is_after_chunk = False
            at = end + len(LINE_END)
        return b"".join(pieces), data[at:]

    def _keep(self, line: bytes) -> None:
        if len(line) >= MAX_LINE_BYTES:
            if self._is_in_trailers:
                raise HeadersTooLarge(f"A trailer exceeds {MAX_LINE_BYTES} bytes.")
            raise MalformedRequest(f"A line that begins a chunk exceeds {MAX_LINE_BYTES} bytes.")
        if BARE_LF.search(line):
            raise MalformedRequest("A line of the chunked body ends without a carriage return.")
        if self._is_after_chunk and line != b"\r":
            raise MalformedRequest("A chunk is longer than its size.")
        self._line = line

    def _read_line(self, line: bytes) -> None:
        if self._is_in_trailers:
            self._read_trailer(line)
            return
        match = SIZE.fullmatch(line)
        if match is None:
            raise MalformedRequest("A chunk does not begin with its size in hexadecimal digits.")
        if self._n_framing > MAX_FRAMING_BYTES + MAX_FRAMING_RATIO * self._n_body:
            raise MalformedRequest("The chunks have more extensions than content.")
        size = int(match[1], 16)
        self._n_left_of_chunk = size
        self._n_body += size
        self._is_after_chunk, self._is_in_trailers = size > 0, size == 0

    def _read_trailer(self, line: bytes) -> None:
        if not line:
            self.is_complete = True
            return
        self._n_trailers += len(line) + len(LINE_END)
        if self._n_trailers > MAX_TRAILER_BYTES:
            raise HeadersTooLarge(f"The trailers exceed {MAX_TRAILER_BYTES} bytes.")
        if not TRAILER.fullmatch(line):
            raise MalformedRequest("A trailer is not a header field.")
