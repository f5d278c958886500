import io
import json
import zlib

import pytest
from PIL import Image

from app.errors import MalformedImage
from app.store.image_structure import check_structure, require_few_scans
from app.store.manifest import Input
from app.store.preprocessing import decode_image
from tests.app.image_bombs import BOMBS, gif_before_image, png_with, separate_scans_jpeg, strips_tiff
from tests.app.odd_images import encode, make_photo, ordinary_images, png_chunk
from tests.app.tiny_store import make_input

RULE = Input.model_validate_json(json.dumps(make_input(side=16)))
PHOTO = make_photo()
# Unusual, but legitimate.
LARGE = {
    "profile of many segments.jpg": encode(PHOTO, "JPEG", icc_profile=bytes(2_000_000)),
    "comment.jpg": encode(PHOTO, "JPEG", comment=bytes(60_000)),
    "two frames of ten scans.mpo": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO] * 5, progressive=True),
    "small chunks.png": png_with(png_chunk(b"tEXt", b"k\0v") * 1000),
    "profile.png": png_with(png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(900_000)))),
    "comment.gif": gif_before_image(b"!\xfe" + (b"\xff" + b"a" * 255) * 4000 + b"\0"),
    "rows.tiff": strips_tiff(9, 9000, bytes(9), 9),
}


@pytest.mark.parametrize("name", BOMBS)
def test_check_structure_refuses_what_costs_more_than_its_pixels(name: str) -> None:
    make, message = BOMBS[name]
    with pytest.raises(MalformedImage, match=message):
        decode_image(make(), RULE, 50_000_000)


@pytest.mark.parametrize("name", LARGE)
def test_check_structure_accepts_large_metadata(name: str) -> None:
    assert decode_image(LARGE[name], RULE, 50_000_000).shape == (16, 16, 3)


@pytest.mark.parametrize(("name", "data"), ordinary_images().items(), ids=lambda value: str(value)[:40])
def test_check_structure_ignores_where_a_file_ends(name: str, data: bytes) -> None:
    for end in range(0, min(len(data), 400), 7):
        check_structure(data[:end])


def test_require_few_scans_counts_those_of_the_first_image() -> None:
    progressive = encode(PHOTO, "JPEG", progressive=True)
    n_scans = progressive.count(b"\xff\xda")
    assert require_few_scans(progressive) == n_scans > 5
    # A thumbnail in the metadata, and a second image.
    assert require_few_scans(encode(PHOTO, "JPEG", progressive=True, exif=b"Exif\0\0" + progressive)) == n_scans
    assert require_few_scans(progressive * 9) == n_scans


def test_separate_scans_without_progression_are_counted() -> None:
    with pytest.raises(MalformedImage, match="scans"):
        require_few_scans(separate_scans_jpeg(40))
    assert Image.open(io.BytesIO(separate_scans_jpeg(40))).info.get("progressive") is None
