"""Heads: the request line and the headers of a request, bounded while they arrive, and parsed once they are complete.

llhttp parses each head alone. So it buffers nothing, and nothing of a body can be parsed as a head.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from app.errors import HeadersTooLarge, MalformedRequest, TargetTooLong, UnsupportedTransferCoding, echo

MAX_TARGET_BYTES = 16_384
# The request line included.
MAX_HEAD_BYTES = 32_768
MAX_HEADERS = 128
# The request line has a method and a version too.
MAX_LINE_BYTES = MAX_TARGET_BYTES + 64

END = b"\r\n\r\n"
LINE_END = b"\r\n"
BARE_LF = re.compile(rb"(?<!\r)\n")
TOKEN_START = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]")
VERSIONS = {b"HTTP/1.1": "1.1", b"HTTP/1.0": "1.0"}
LENGTH = re.compile(rb"[0-9]{1,18}")
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
# An upgrade that is not wanted is ignored (RFC 9110, 7.8). llhttp would end the message after its head instead.
UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)
IGNORED = b"x-ignored-upgrade"
# Headers of which this connection takes notice.
FRAMING = {b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"}


@dataclass(slots=True)
class Head:
    """A request without its body. length: of the body in bytes; None if it is chunked."""

    method: str
    raw_path: bytes
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    is_kept_alive: bool
    length: int | None
    expects_continue: bool

    @property
    def path(self) -> str:
        path = self.raw_path.decode("ascii")
        return unquote(path) if "%" in path else path


class HeadBuffer:
    """The bytes of a head that is not complete yet."""

    def __init__(self) -> None:
        self._data = b""
        self._n_lines = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the head, its last line end included, and what follows it. Empty and empty if it is not complete.

        Raises: TargetTooLong, HeadersTooLarge, MalformedRequest.
        """
        n_searched = len(self._data)
        # Empty lines before the request line are ignored (RFC 9112, 2.2).
        data = self._data + data if n_searched else data.lstrip(LINE_END)
        end = data.find(END, max(0, n_searched - len(END)), MAX_HEAD_BYTES)
        if end < 0:
            self._keep(data, n_searched)
            return b"", b""
        self._data, self._n_lines = b"", 0
        end += len(END)
        return data[:end], data[end:]

    def _keep(self, data: bytes, n_searched: int) -> None:
        self._data = data
        self._n_lines += data.count(b"\n", n_searched)
        if data and not TOKEN_START.match(data):
            raise MalformedRequest("The request does not begin with a method.")
        if BARE_LF.search(data, max(0, n_searched - 1)):
            raise MalformedRequest("A line of the head ends without a carriage return.")
        _require_bounded(data, self._n_lines)


def _require_bounded(data: bytes, n_lines: int) -> None:
    if len(data) > MAX_LINE_BYTES and data.find(LINE_END, 0, MAX_LINE_BYTES) < 0:
        raise TargetTooLong(f"The request line exceeds {MAX_LINE_BYTES} bytes.", max_target_bytes=MAX_TARGET_BYTES)
    if len(data) >= MAX_HEAD_BYTES or n_lines > MAX_HEADERS + 2:
        raise HeadersTooLarge(
            f"The headers exceed {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} fields.",
            max_head_bytes=MAX_HEAD_BYTES,
            max_headers=MAX_HEADERS,
        )


class _Found:
    """What llhttp finds in a head."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.hosts: list[bytes] = []
        self.lengths: list[bytes] = []
        self.codings: list[bytes] = []
        self.expects_continue = self.is_closing = self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.rstrip(b" \t")
        if name in FRAMING:
            self._note(name, value)
        if name != IGNORED:
            self.headers.append((name, value))

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self.hosts.append(value)
        elif name == b"content-length":
            self.lengths.append(value)
        elif name == b"transfer-encoding":
            self.codings += _list(value)
        elif name == b"connection":
            self.is_closing = self.is_closing or b"close" in _list(value)
        else:
            self.expects_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _list(value: bytes) -> list[bytes]:
    return [item.strip(b" \t").lower() for item in value.split(b",")]


def parse_head(head: bytes) -> Head:
    """Parse a complete head.

    Raises: MalformedRequest, TargetTooLong, HeadersTooLarge, UnsupportedTransferCoding.
    """
    _require_bounded(head, head.count(b"\n"))
    # It must not refer to the parser: the garbage collector would have to free both.
    found = _Found()
    method = _parse(head, found)
    version = VERSIONS.get(head[: head.index(LINE_END)][-8:])
    if method == "CONNECT" or not found.is_complete:
        raise MalformedRequest(f"The method {echo(method)} is not for an origin server.")
    if version is None:
        raise MalformedRequest("The request line does not end with HTTP/1.1 or HTTP/1.0.")
    _require_host(found.hosts, version)
    raw_path, query = _split(found.url)
    return Head(
        method,
        raw_path,
        query,
        version,
        found.headers,
        version == "1.1" and not found.is_closing,
        _read_length(found, version),
        found.expects_continue and version == "1.1",
    )


def _parse(head: bytes, found: _Found) -> str:
    """Let llhttp parse a head. Returns the method."""
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(UPGRADE.sub(LINE_END + IGNORED, head))
    except httptools.HttpParserUpgrade:
        # CONNECT.
        pass
    except httptools.HttpParserError as error:
        raise MalformedRequest(f"The head is not valid HTTP/1.1: {error}.") from error
    return str(parser.get_method(), "ascii")


def _require_host(hosts: list[bytes], version: str) -> None:
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise MalformedRequest(f"The request has {len(hosts)} Host headers; accepted: exactly one.")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise MalformedRequest(f"Host: {echo(hosts[0].decode('latin-1'))!r} is not a host with an optional port.")


def _split(url: bytes) -> tuple[bytes, bytes]:
    """Split the target into path and query."""
    if url == b"*":
        return url, b""
    try:
        parts = httptools.parse_url(url)
        path: bytes = parts.path or b"/"
        path.decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError) as error:
        raise MalformedRequest("The request target is not valid.") from error
    return path, parts.query or b""


def _read_length(fields: _Found, version: str) -> int | None:
    """Read the length of the body. Whatever another server on the way could understand otherwise is refused."""
    if fields.codings:
        if fields.lengths or version != "1.1":
            raise MalformedRequest("Transfer-Encoding is accepted in HTTP/1.1 only, and without Content-Length.")
        if fields.codings != [b"chunked"]:
            given = echo(b", ".join(fields.codings).decode("latin-1"))
            raise UnsupportedTransferCoding(f"Transfer-Encoding: {given!r}; accepted: chunked.", accepted=["chunked"])
        return None
    if not fields.lengths:
        return 0
    if len(fields.lengths) > 1 or not LENGTH.fullmatch(fields.lengths[0]):
        raise MalformedRequest("Content-Length: accepted is one number of bytes.")
    return int(fields.lengths[0])
