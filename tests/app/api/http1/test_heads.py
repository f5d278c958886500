from itertools import pairwise

import pytest

from app.api.http1.heads import MAX_HEAD_BYTES, MAX_HEADERS, MAX_TARGET_BYTES, Head, HeadBuffer, parse_head
from app.errors import HeadersTooLarge, MalformedRequest, ServiceError, TargetTooLong, UnsupportedTransferCoding

GET = b"GET /models?a=b HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"


def read(stream: bytes, step: int = 1) -> tuple[Head, bytes]:
    buffer = HeadBuffer()
    for start, end in pairwise([*range(0, len(stream), step), len(stream)]):
        head, rest = buffer.feed(stream[start:end])
        if head:
            return parse_head(head), rest + stream[end:]
    raise AssertionError("the head is not complete")


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_head_ends_at_its_empty_line_however_it_is_split(step: int) -> None:
    head, rest = read(b"\r\n\r\n" + GET + b"A:  b \r\n\r\n\r\nrest", step)
    assert (head.method, head.path, head.query, head.version) == ("GET", "/models", b"a=b", "1.1")
    assert head.headers == [(b"host", b"x"), (b"a", b"b")]
    assert (head.length, head.is_kept_alive, rest) == (0, True, b"\r\nrest")


@pytest.mark.parametrize(
    "offer",
    [
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n",
        b"upgrade: websocket\r\nupgrade: h2c\r\nconnection: upgrade\r\n",
        b"Connection: Upgrade\r\nUPGRADE:\tTLS/1.0\r\n",
    ],
)
def test_offered_upgrade_leaves_the_body_to_the_request(offer: bytes) -> None:
    assert read(POST + offer + b"Content-Length: 7\r\n\r\n", 1000)[0].length == 7
    head, _ = read(POST + offer + b"Transfer-Encoding: Chunked\r\n\r\n", 1000)
    assert (head.length, head.is_kept_alive) == (None, True)


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", MalformedRequest),
        (GET + b"Host: x\r\n\r\n", MalformedRequest),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", MalformedRequest),
        (b"GET / HTTP/1.1\r\nHost: http://x\r\n\r\n", MalformedRequest),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", MalformedRequest),
        (b"GET /\r\n\r\n", MalformedRequest),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", MalformedRequest),
        (b"GET / RTSP/1.0\r\nHost: x\r\n\r\n", MalformedRequest),
        (b"PRI * HTTP/2.0\r\n\r\n", MalformedRequest),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", MalformedRequest),
        (b"\x16\x03\x01\x02", MalformedRequest),
        (b"GET / HTTP/1.1\nHost: x\n\n", MalformedRequest),
        (GET + b"A: b\n\r\n", MalformedRequest),
        (GET + b"A: b\r\n c\r\n\r\n", MalformedRequest),
        (GET + b"A : b\r\n\r\n", MalformedRequest),
        (GET + b"A: \x00\r\n\r\n", MalformedRequest),
        (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", MalformedRequest),
        (POST + b"Content-Length: 1, 1\r\n\r\n", MalformedRequest),
        (POST + b"Content-Length: +1\r\n\r\n", MalformedRequest),
        (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", MalformedRequest),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", MalformedRequest),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", MalformedRequest),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", UnsupportedTransferCoding),
        (b"GET /" + b"y" * MAX_HEAD_BYTES, TargetTooLong),
        (GET + b"A: " + b"y" * MAX_HEAD_BYTES, HeadersTooLarge),
        (GET + b"A: b\r\n" * (MAX_HEADERS + 2), HeadersTooLarge),
    ],
)
@pytest.mark.parametrize("step", [1, 1_000_000])
def test_doubtful_heads_are_refused(stream: bytes, error: type[ServiceError], step: int) -> None:
    with pytest.raises(error):
        read(stream, step)


def test_large_heads_are_accepted() -> None:
    target = b"/" + b"y" * (MAX_TARGET_BYTES - 1)
    headers = b"".join(b"A%d: %s\r\n" % (number, b"b" * 140) for number in range(100))
    head, _ = read(b"GET " + target + b" HTTP/1.1\r\nHost: [::1]:80\r\n" + headers + b"\r\n", 1000)
    assert (head.raw_path, len(head.headers)) == (target, 101)
