"""Over a hundred odd inputs: none gets a 5xx, the next good image is classified, and memory does not grow."""

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.app.odd_images import encode, exif_bytes, make_photo, ordinary_images, refused_images, truncated_images
from tests.app.tiny_store import expected_logits
from tests.integration.server import Address, on_both

GOOD = make_photo(8, 8)
GOOD_PNG = encode(GOOD, "PNG")
# Margin for the allocator. A single leaked 12 Mpx image would exceed it.
GROWTH_BYTES = 32_000_000
ROUNDS = 3
pytestmark = on_both


def odd_bodies() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Yield a name, a body and its headers."""
    for name, (data, _) in refused_images().items():
        yield name, data, {}
        yield f"{name} that says it is a JPEG", data, {"Content-Type": "image/jpeg"}
    for name, data in truncated_images():
        yield name, data, {}
    form = {"Content-Type": "multipart/form-data; boundary=XX"}
    head = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    yield "empty", b"", {}
    yield "empty form", b"--XX--\r\n", form
    yield "form without an end", head + GOOD_PNG, form
    yield "form without a boundary", head + GOOD_PNG + b"\r\n--XX--\r\n", {"Content-Type": "multipart/form-data"}
    yield "form of an image with another boundary", GOOD_PNG, form
    yield "form of empty files", (head + b"\r\n") * 20 + b"--XX--\r\n", form
    yield "form of a thousand files", (head + b"\r\n") * 1000 + b"--XX--\r\n", form
    yield "exif of nonsense", encode(GOOD, "JPEG", exif=b"Exif\0\0" + bytes(range(256)) * 10), {}
    yield "exif with another orientation", encode(GOOD, "JPEG", exif=exif_bytes(200)), {}
    yield "image of 12 Mpx", encode(Image.new("RGBA", (4000, 3000), (9, 9, 200, 99)), "PNG"), {}
    yield "image with a tail", GOOD_PNG + bytes(100_000), {}
    yield "image after a head", b"\r\n" + GOOD_PNG, {}
    yield "huge content type", GOOD_PNG, {"Content-Type": "image/" + "x" * 20_000}


def assert_next_image_is_classified(server: Address) -> None:
    status, body = server.ask("POST", "/classify?r=16", GOOD_PNG)
    assert status == 200, body
    logits = expected_logits(np.asarray(GOOD)[None], 16)[0]
    assert json.loads(body)["predictions"][0]["index"] == int(logits.argmax())


def test_odd_inputs_never_get_a_5xx_and_memory_does_not_grow(server: Address) -> None:
    inputs = list(odd_bodies())
    assert len(inputs) >= 100
    # Warm up, since decoders allocate permanent memory at first use.
    for data in ordinary_images().values():
        assert server.ask("POST", "/classify", data)[0] == 200
    resident = [server.resident_bytes]
    statuses: Counter[int] = Counter()
    for _ in range(ROUNDS):
        for name, data, headers in inputs:
            status, body = server.ask("POST", "/classify", data, headers)
            assert 200 <= status < 500, (name, status, body)
            assert_next_image_is_classified(server)
            statuses[status] += 1
        resident.append(server.resident_bytes)
    assert resident[-1] - resident[0] < GROWTH_BYTES, resident
    assert {400, 413, 415} <= set(statuses)
    assert "Traceback" not in server.log
