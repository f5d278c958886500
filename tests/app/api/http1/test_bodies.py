"""h11 is the oracle: it reads a stream as one request or refuses it, and so must we, however the stream is split."""

import random

import h11
import pytest

from app.api.http1.bodies import MAX_LINE_BYTES, MAX_TRAILER_BYTES, ChunkedReader, LengthReader
from app.errors import HeadersTooLarge, MalformedRequest, ServiceError

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
# What streams are made of, with what other servers are known to disagree about.
PARTS = (
    *(b"0", b"1", b"2", b"a", b"01", b"5", b"-1", b"+1", b"0x1", b"1_0", b"x", b"xy", b"hello"),
    *(b"\r\n", b"\r\n", b"\r\n", b"0\r\n\r\n", b"\n", b"\r", b" ", b"\x00", b";a=b", b"\t;"),
    *(b"A: b\r\n", b"A : b\r\n", b"GET / HTTP/1.1\r\n\r\n"),
)


def read_ours(stream: bytes, sizes: list[int]) -> tuple[bytes, bytes] | None:
    """Return the body and what follows it; None if the stream is refused or incomplete."""
    reader, body, at = ChunkedReader(), b"", 0
    for size in sizes:
        piece, rest = reader.feed(stream[at : at + size])
        at += size
        body += piece
        if reader.is_complete:
            return body, rest + stream[at:]
    return None


def read_h11(stream: bytes) -> tuple[bytes, bytes] | None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(HEAD + stream)
    body = b""
    try:
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Data):
                body += event.data
            if isinstance(event, h11.EndOfMessage):
                return body, connection.trailing_data[0]
    except h11.RemoteProtocolError:
        pass
    return None


def split(stream: bytes, generator: random.Random) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < len(stream):
        sizes.append(generator.choice((1, 1, 2, 3, 7, 50)))
    return sizes


def make_stream(generator: random.Random) -> bytes:
    chunks = [bytes(generator.randrange(1, 9)) for _ in range(generator.randrange(4))]
    stream = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\nGET"
    for _ in range(generator.randrange(3)):
        at = generator.randrange(len(stream))
        stream = stream[:at] + generator.choice(PARTS) + stream[at + generator.randrange(2) :]
    return stream


def test_chunked_bodies_end_where_h11_says() -> None:
    generator = random.Random(0)
    n_accepted = 0
    for _ in range(20_000):
        stream = make_stream(generator)
        try:
            ours = read_ours(stream, split(stream, generator))
        except ServiceError:
            ours = None
        # We may be stricter, never laxer.
        assert ours is None or ours == read_h11(stream), stream
        n_accepted += ours is not None
    assert n_accepted > 5000


def test_split_makes_no_difference() -> None:
    generator = random.Random(1)
    for _ in range(2000):
        stream = make_stream(generator)
        outcomes = []
        for sizes in ([len(stream)], [1] * len(stream), split(stream, generator)):
            try:
                outcomes.append(read_ours(stream, sizes))
            except ServiceError:
                outcomes.append(None)
        assert outcomes[0] == outcomes[1] == outcomes[2], stream


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"1;" + b"a" * MAX_LINE_BYTES, MalformedRequest),
        (b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n" * 10_000, MalformedRequest),
        (b"0\r\nA: " + b"a" * MAX_LINE_BYTES, HeadersTooLarge),
        (b"0\r\n" + b"A: b\r\n" * MAX_TRAILER_BYTES, HeadersTooLarge),
        (b"5\nhello", MalformedRequest),
    ],
)
def test_framing_is_bounded_as_it_arrives(stream: bytes, error: type[ServiceError]) -> None:
    with pytest.raises(error):
        read_ours(stream, [1] * len(stream))


def test_chunks_of_one_byte_are_accepted() -> None:
    stream = b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
    assert read_ours(stream, [len(stream)]) == (b"x" * 20_000, b"")


def test_length_separates_the_next_request() -> None:
    reader = LengthReader(5)
    assert reader.feed(b"hel") == (b"hel", b"")
    assert not reader.is_complete
    assert reader.feed(b"loGET /") == (b"lo", b"GET /")
    assert reader.is_complete
