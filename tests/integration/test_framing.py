"""Clients and attackers that nobody here wrote, as bytes on a socket, against real processes."""

import contextlib
import itertools
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.app.odd_images import encode, make_photo
from tests.integration.server import Address, Server, on_both
from tests.integration.test_http import send_forever

PNG = encode(make_photo(8, 8), "PNG")
# Larger than what stalled uploads leave free below.
NOISE = encode(make_photo(360, 360), "PNG")
SECONDS = 60
JDK = Path(__file__).parent / "clients" / "Jdk.java"
STATUS = re.compile(rb"HTTP/1\.1 (\d+) ")
LAST = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
OFFERS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
    b"connection: keep-alive, upgrade\r\nupgrade: TLS/1.0\r\n",
]
# Path, body, status. A body that is a request must never be answered as one.
POSTS = [
    (b"/classify?r=16", PNG, 200),
    (b"/v2/models/tiny/infer", b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"/nothing", b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
]


def connect(server: Address) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)


def send(connection: socket.socket, pieces: Iterable[bytes]) -> None:
    """Send all pieces, each as its own packet, or as many as the server takes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def exchange(server: Address, *pieces: bytes, is_half_closed: bool = False) -> list[int]:
    """Return the statuses of all responses until the server closes the connection."""
    with connect(server) as connection:
        send(connection, pieces)
        if is_half_closed:
            connection.shutdown(socket.SHUT_WR)
        return [int(status) for status in STATUS.findall(read_all(connection))]


@on_both
def test_offered_upgrades_are_ignored_and_the_connection_stays_in_sync(server: Address) -> None:
    for (path, body, status), offer, is_chunked, is_split in itertools.product(POSTS, OFFERS, (0, 1), (0, 1)):
        framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
        head = b"POST %s HTTP/1.1\r\nHost: x\r\n%s%s\r\n\r\n" % (path, offer, framing)
        sent = b"7\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:7], len(body) - 7, body[7:]) if is_chunked else body
        pieces = [head, sent[:9], sent[9:], LAST] if is_split else [head + sent + LAST]
        assert exchange(server, *pieces) == [status, 200], (path, offer, is_chunked, is_split)


@on_both
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
        (CHUNKED + b"5\r\nhelloworld\r\n0\r\n\r\n", 400),
        (b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 10_000_000 + b"\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200_000 + b"\r\n", 431),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(PNG), PNG) + b"A: b\r\n" * 1_000_000 + b"\r\n", 431),
        (CHUNKED + b"5;" + b"y" * 1_000_000, 400),
    ],
)
def test_ambiguous_or_endless_framing_ends_the_connection(server: Address, request_bytes: bytes, status: int) -> None:
    # Whatever follows is not read as a request.
    assert exchange(server, request_bytes + LAST) == [status]


@on_both
def test_half_closed_connections_get_their_answers(server: Address) -> None:
    post = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(PNG), PNG)
    assert exchange(server, post, is_half_closed=True)[-1:] == [200]
    assert exchange(server, post + post, is_half_closed=True).count(200) == 2
    assert exchange(server, post[:-5], is_half_closed=True) == []


@on_both
@pytest.mark.parametrize("path", ["/nothing", "/health/live", "/classify?r=3", "/classify"])
def test_answer_before_the_end_of_the_body_arrives(server: Address, path: str) -> None:
    """urllib sends `Connection: close`, and reads only after it has written everything."""
    body, statuses = bytes(15_000_000), Counter[int]()
    for _ in range(15):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", body, SECONDS)
        statuses[refusal.value.code] += 1
        refusal.value.close()
    assert len(statuses) == 1, statuses


def endless_header() -> Iterator[bytes]:
    yield b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: "
    yield from itertools.repeat(b"y" * 65_536, 200)


def many_headers() -> Iterator[bytes]:
    yield b"GET /v2 HTTP/1.1\r\nHost: x\r\n"
    yield from itertools.repeat(b"A: b\r\n" * 10_000, 200)


def tiny_chunks() -> Iterator[bytes]:
    yield CHUNKED
    yield from itertools.repeat(b"1\r\nx\r\n" * 10_000, 200)


@pytest.mark.parametrize("attack", [endless_header, many_headers, tiny_chunks])
def test_endless_framing_stalls_nobody_and_takes_no_memory(
    server: Server, attack: Callable[[], Iterator[bytes]]
) -> None:
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            with connect(server) as connection:
                send(connection, itertools.takewhile(lambda _: not is_over.is_set(), attack()))

    server.ask("GET", "/health/live")
    at_rest, peak, durations = server.resident_bytes, 0, []
    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        started_at = time.monotonic()
        assert server.ask("GET", "/health/live")[0] == 200
        durations.append(time.monotonic() - started_at)
        peak = max(peak, server.resident_bytes)
        time.sleep(0.02)
    is_over.set()
    for thread in threads:
        thread.join()
    assert peak - at_rest < 50_000_000
    # 0.1 s where CPU time is free; the threads of this test take it too. An endless header stalled all for 24 s.
    assert sorted(durations)[-2] < 2, durations


@pytest.fixture(scope="module")
def impatient(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(
        store,
        log,
        max_body_bytes=200_000,
        max_in_flight_bytes=500_000,
        head_timeout_seconds=1,
        body_timeout_seconds=1,
        write_timeout_seconds=1,
        keep_alive_seconds=2,
        max_connections=30,
    ) as server:
        yield server


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"", []),
        (b"GET /v2 HT", [408]),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n12345", [408]),
        (CHUNKED + b"5\r\nhel", [408]),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
        # The answer is not repeated.
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n12345", [404]),
    ],
)
def test_silent_connections_are_closed(impatient: Server, sent: bytes, statuses: list[int]) -> None:
    before = count_refusals(impatient, "request_timeout")
    assert exchange(impatient, sent) == statuses
    assert count_refusals(impatient, "request_timeout") - before == statuses.count(408)


def test_silent_connections_keep_nobody_out(impatient: Server) -> None:
    before = count_refusals(impatient, "too_many_connections")
    with contextlib.ExitStack() as stack:
        upload = stack.enter_context(connect(impatient))
        upload.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PNG))
        for _ in range(100):
            stack.enter_context(connect(impatient))
        assert impatient.ask("GET", "/health/live")[0] == 200
        upload.sendall(PNG)
        assert upload.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert count_refusals(impatient, "too_many_connections") - before >= 70


def count_refusals(server: Server, reason: str) -> float:
    text = server.ask("GET", "/metrics")[1].decode()
    return float(re.findall(rf'^dtem_refusals_total{{reason="{reason}"}} (\S+)$', text, re.MULTILINE)[0])


def test_slow_upload_that_goes_on_is_served(impatient: Server) -> None:
    """It takes three times as long as a stalled one has."""
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(NOISE)
    step = len(NOISE) // 30 + 1
    with connect(impatient) as connection:
        connection.sendall(head)
        for start in range(0, len(NOISE), step):
            connection.sendall(NOISE[start : start + step])
            time.sleep(0.1)
        assert STATUS.findall(read_all(connection)) == [b"200"]


def test_unread_responses_are_dropped(impatient: Server) -> None:
    """The client asks for ever more, and reads nothing."""
    with connect(impatient) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        requests = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
        with pytest.raises(OSError):  # noqa: PT011 (reset or broken pipe, as the kernel likes)
            send_forever(connection, requests)


def test_stalled_uploads_do_not_keep_others_out(impatient: Server) -> None:
    # Each makes enough progress not to time out.
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"
    is_over = threading.Event()
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect(impatient)) for _ in range(3)]
        for connection in stalled:
            connection.sendall(head + NOISE + bytes(150_000 - len(NOISE)))

        def trickle() -> None:
            while not is_over.wait(0.2):
                for connection in stalled:
                    with contextlib.suppress(OSError):
                        connection.sendall(bytes(1000))

        thread = threading.Thread(target=trickle)
        thread.start()
        assert [impatient.ask("POST", "/classify", NOISE)[0] for _ in range(10)] == [200] * 10
        is_over.set()
        thread.join()
        # One was enough.
        assert count_refusals(impatient, "upload_evicted") == 1


@on_both
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
def test_java_uploads(server: Address, tmp_path: Path) -> None:
    """Its client offers HTTP/2 by default."""
    image = tmp_path / "image.png"
    image.write_bytes(NOISE)
    url = f"http://127.0.0.1:{server.port}/classify?r=16"
    command = ["java", str(JDK), url, str(image), "20"]
    assert subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout.split() == [b"200"] * 20


@on_both
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_uploads_with_an_offer_of_http2(server: Address, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(NOISE)
    url = f"http://127.0.0.1:{server.port}/classify?r=16"
    command = ["curl", "-sS", "--http2", "--data-binary", f"@{image}", url, "--next", *("--http2", "-T", str(image))]
    done = subprocess.run([*command, "-X", "POST", url], check=True, capture_output=True, timeout=SECONDS)
    assert done.stdout.count(b'"r":16') == 2
