import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.app.odd_images import encode, make_photo
from tests.integration.server import Address, on_both

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 60
# `max_body_bytes` of the fixture.
LIMIT = 1_000_000
pytestmark = on_both


def send_raw(server: Address, data: bytes, *more: bytes, is_half_closed: bool = False) -> bytes:
    """Send raw bytes, and read until the server closes the connection.

    is_half_closed: whether to signal the end of the data.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        answer = b""
        try:
            for piece in (data, *more):
                connection.sendall(piece)
            if is_half_closed:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                answer += chunk
        except OSError:
            pass
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.fixture(autouse=True)
def _next_good_image_is_answered(server: Address) -> object:
    yield
    status, body = server.ask("POST", "/classify?r=16", PNG)
    assert status == 200, body
    assert json.loads(body)["r"] == 16


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /models?\xff=1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nshort",
        b"POST /classify?r=\xed\xa0\x80 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /classify HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_broken_requests_never_get_a_5xx(server: Address, request_bytes: bytes) -> None:
    answer = send_raw(server, request_bytes, is_half_closed=True)
    assert not answer or status_of(answer) < 500, answer
    assert "Traceback" not in server.log


def test_chunked_body_is_classified(server: Address) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (PNG[:7], PNG[7:])]
    assert status_of(send_raw(server, head, *chunks, b"0\r\n\r\n")) == 200


def test_chunked_body_is_refused_at_the_limit(server: Address) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (100_000, bytes(100_000))
    answer = send_raw(server, head, *[piece] * 12, b"0\r\n\r\n")
    assert status_of(answer) == 413
    assert b"body_too_large" in answer
    assert b"connection: close" in answer.lower()


def test_endless_body_is_refused_while_it_is_sent(server: Address) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(head)
        piece = b"%x\r\n%s\r\n" % (100_000, bytes(100_000))
        for _ in range(11):
            connection.sendall(piece)
        # The client is still sending.
        assert status_of(connection.recv(65536)) == 413
        with pytest.raises(OSError):  # noqa: PT011 (reset or broken pipe, as the kernel likes)
            send_forever(connection, piece)


def send_forever(connection: socket.socket, piece: bytes) -> None:
    while True:
        connection.sendall(piece)


@pytest.mark.parametrize("headers", [{}, {"Expect": "100-continue"}])
def test_refusal_of_a_large_body_arrives(server: Address, headers: dict[str, str]) -> None:
    status, body = server.ask("POST", "/classify", bytes(30 * LIMIT), headers)
    assert status == 413
    assert json.loads(body)["max_body_bytes"] == LIMIT


def test_refused_query_keeps_the_connection_open(server: Address) -> None:
    first = b"POST /classify?r=3 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(PNG), PNG)
    second = first.replace(b"r=3", b"r=8").replace(b"Host: x", b"Host: x\r\nConnection: close")
    answer = send_raw(server, first + second)
    assert status_of(answer) == 422
    assert b"HTTP/1.1 200 OK" in answer


def test_disconnected_clients_are_cancelled(server: Address) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PNG)
    for sent in (head, head + PNG[:20], head + PNG) * 10:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        connection.sendall(sent)
        connection.close()
    assert server.ask("POST", "/classify", PNG)[0] == 200
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log
    assert sum(server.series("dtem_in_flight_images")) == 0


def test_concurrent_clients_get_their_own_responses(server: Address) -> None:
    rates = [0, 8, 16] * 15

    def ask(r: int) -> int:
        status, body = server.ask("POST", f"/classify?r={r}", PNG)
        return json.loads(body)["r"] if status == 200 else status

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, rates)) == rates


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_uploads(server: Address, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    image.write_bytes(PNG)
    url = f"http://127.0.0.1:{server.port}/classify?r=16"

    def curl(*arguments: str) -> dict[str, object]:
        done = subprocess.run(["curl", "-sS", *arguments, url], check=True, capture_output=True, timeout=SECONDS)
        document: dict[str, object] = json.loads(done.stdout)
        return document

    assert curl("--data-binary", f"@{image}")["r"] == 16
    assert len(curl("-F", f"file=@{image}", "-F", f"file=@{image}")["results"]) == 2  # type: ignore[arg-type]
    large = tmp_path / "large"
    large.write_bytes(bytes(5 * LIMIT))
    assert curl("--data-binary", f"@{large}")["code"] == "body_too_large"
    assert curl("-F", f"file=@{large}")["code"] == "body_too_large"
    assert curl("-T", str(large), "-X", "POST")["code"] == "body_too_large"


@pytest.mark.parametrize("text", ["-5", "0", "nan", "inf", "1e9", "soon"])
def test_invalid_deadline_is_refused_by_name(server: Address, text: str) -> None:
    status, body = server.ask("POST", f"/classify?deadline_ms={text}", PNG)
    assert status == 422
    assert "deadline_ms" in json.loads(body)["detail"]


def test_unmeetable_deadline_is_refused_immediately(server: Address) -> None:
    status, body = server.ask("POST", "/classify?deadline_ms=0.01", PNG)
    assert (status, json.loads(body)["code"]) in {(429, "deadline_unmeetable"), (504, "deadline_passed")}
