"""Training and serving decode a file to bit-identical pixels."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from app.store.manifest import Input
from app.store.preprocessing import decode_image
from tests.app.odd_images import encode, make_photo, ordinary_images
from tests.app.tiny_store import make_input
from training.data.preprocessing import InputRule, read_pixels

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE_IMAGES = {
    path.name: path.read_bytes() for path in sorted(EXAMPLES.glob("*")) if path.suffix in (".jpg", ".png")
}
IMAGES = ordinary_images() | EXAMPLE_IMAGES
SIDES = (16, 112)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def assert_same_pixels(data: bytes, side: int) -> None:
    rule = Input.model_validate_json(json.dumps(make_input(side)))
    served = decode_image(data, rule, 50_000_000)
    trained = read_pixels(io.BytesIO(data), InputRule(height=side, width=side, resize_shorter_side=side))
    np.testing.assert_array_equal(served, trained)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", IMAGES)
def test_both_halves_decode_the_same_pixels(name: str, side: int) -> None:
    assert_same_pixels(IMAGES[name], side)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (31, 500), (1000, 33), (223, 225), (640, 481)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_both_halves_decode_the_same_pixels_at_every_size(size: tuple[int, int], kind: str) -> None:
    for side in SIDES:
        assert_same_pixels(encode(make_photo(*size), kind), side)
