import json
import subprocess
import sys

import pytest

from app.errors import TooManyPixels
from app.store.image_cost import FIXED_BYTES
from app.store.manifest import Input
from app.store.preprocessing import DecodeLimits, open_image
from tests.app.image_bombs import lossless_webp, tile_tiff
from tests.app.odd_images import encode, make_photo, make_png, png_chunk
from tests.app.tiny_store import make_input

RULE = Input.model_validate_json(json.dumps(make_input(side=16)))
# Of the estimate over the measurement. Looser ones would refuse images that fit.
MAX_RATIO = 3


def test_estimated_memory_is_an_upper_bound_for_every_kind_of_image() -> None:
    # A process of its own: other tests leave memory that is reused.
    command = [sys.executable, "-W", "ignore", "-m", "tests.app.store.peaks"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) > 40
    assert {name: peak for name, peak in peaks.items() if peak["measured"] > peak["estimated"]} == {}
    loose = {
        name: peak
        for name, peak in peaks.items()
        if peak["estimated"] - 2 * FIXED_BYTES > MAX_RATIO * max(peak["measured"], FIXED_BYTES)
    }
    assert loose == {}


@pytest.mark.parametrize("data", [lossless_webp(1000, 1000), tile_tiff(4000)], ids=["webp", "tile"])
def test_open_image_refuses_an_image_that_needs_more_memory_than_the_limit(data: bytes) -> None:
    needed = open_image(data, RULE, DecodeLimits(50_000_000)).cost.n_bytes
    assert open_image(data, RULE, DecodeLimits(50_000_000, needed)).decode().shape == (16, 16, 3)
    with pytest.raises(TooManyPixels, match=f"would take {needed} bytes; the limit is {needed - 1}") as caught:
        open_image(data, RULE, DecodeLimits(50_000_000, needed - 1))
    assert caught.value.members["max_bytes"] == needed - 1


def test_metadata_after_the_pixels_cannot_exceed_the_estimate() -> None:
    rows = (b"\0" + bytes(3 * 1500)) * 1500
    plain = make_png(1500, 1500, 8, 2, rows)
    late = plain[:-12] + png_chunk(b"tRNS", bytes(6)) + plain[-12:]
    assert open_image(plain, RULE, DecodeLimits(9_000_000)).decode().shape == (16, 16, 3)
    opened = open_image(late, RULE, DecodeLimits(9_000_000))
    with pytest.raises(TooManyPixels):
        opened.decode()


def test_estimated_time_grows_with_scans_and_pixels_not_with_the_file() -> None:
    def seconds(data: bytes) -> float:
        return open_image(data, RULE, DecodeLimits(50_000_000)).cost.seconds

    photo = make_photo(1000, 800)
    assert seconds(encode(photo, "JPEG", progressive=True)) > 2 * seconds(encode(photo, "JPEG"))
    assert seconds(lossless_webp(4000, 4000)) > 100 * seconds(encode(make_photo(), "WEBP"))
