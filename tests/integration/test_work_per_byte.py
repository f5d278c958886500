"""Small requests that cost much: other clients are still served, and memory is bounded.

The bounds hold on a loaded machine. Without an attack beside them, `/health/live` takes some milliseconds.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.app.api.v2.json_bombs import make_json_bombs
from tests.app.image_bombs import lossless_webp, scans_jpeg
from tests.app.odd_images import encode, make_photo
from tests.integration.attack import Watch, send_together
from tests.integration.server import Server

GOOD = encode(make_photo(600, 400), "JPEG")
FORM = {"Content-Type": "multipart/form-data; boundary=XX"}
MAX_BODY_BYTES = Settings().max_body_bytes
# One for each member, and each that is slow in its own way.
JSON_BOMBS = (
    "numbers in inputs",
    "objects in inputs",
    "numbers in pixels",
    "lists in pixels",
    "pairs in pixels",
    "numbers in an input's shape",
    "digits in parameters",
    "keys in parameters",
    "numbers in outputs",
    "string in id",
    "empty strings in files",
    "depth in pixels",
    "blanks in pixels",
    "unknown members",
    "two bytes and four",
)
PART = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%s\r\n'
MAX_GROWTH_BYTES = 400 << 20
# Measured: 0.1 s, and more than 10 s for the last of the costly images.
MAX_SECONDS = 3.0


@pytest.fixture(scope="module")
def service(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(store, tmp_path_factory.mktemp("log") / "server.log") as server:
        # Libraries allocate permanent memory at their first use.
        for kind in ("JPEG", "WEBP", "PNG"):
            assert server.ask("POST", "/classify", encode(make_photo(), kind))[0] == 200
        yield server


def make_form(image: bytes, n_files: int) -> bytes:
    return PART % image * n_files + b"--XX--\r\n"


COSTLY: dict[str, tuple[Callable[[], bytes], dict[str, str], int, set[int]]] = {
    "webp above the limit": (lambda: lossless_webp(7000, 7000), {}, 16, {413}),
    "webp": (lambda: lossless_webp(4000, 4000), {}, 6, {200, 429}),
    "forms of webp": (lambda: make_form(lossless_webp(4000, 4000), 8), FORM, 1, {200}),
    "jpeg of 32 scans": (lambda: scans_jpeg(5000, 5000, 22), {}, 6, {200, 429}),
    "jpeg of 140 scans": (lambda: scans_jpeg(5000, 5000, 130), {}, 16, {400}),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_images_delay_nobody_and_share_a_budget(service: Server, name: str) -> None:
    make, headers, n_requests, expected = COSTLY[name]
    body, waits = make(), []

    def ask_costly() -> int:
        return service.ask("POST", "/classify", body, headers)[0]

    def ask_ordinary() -> int:
        statuses = set()
        for _ in range(5):
            time.sleep(0.1)
            started_at = time.monotonic()
            statuses.add(service.ask("POST", "/classify?r=16", GOOD)[0])
            waits.append(time.monotonic() - started_at)
        return max(statuses)

    with Watch(service) as watch:
        *statuses, ordinary = send_together([*[ask_costly] * n_requests, ask_ordinary])
    assert ordinary == 200
    assert set(statuses) <= expected
    assert max(waits) < MAX_SECONDS
    assert watch.slowest_seconds < MAX_SECONDS
    assert watch.growth_bytes < MAX_GROWTH_BYTES


def test_json_at_the_body_limit_delays_nobody_and_takes_little_memory(service: Server) -> None:
    bombs = make_json_bombs(MAX_BODY_BYTES)
    with Watch(service) as watch:
        for name in JSON_BOMBS:
            status, answer = service.ask("POST", "/v2/models/tiny/infer", bombs[name])
            assert status == 400, (name, answer)
    assert watch.slowest_seconds < MAX_SECONDS
    assert watch.growth_bytes < MAX_GROWTH_BYTES
