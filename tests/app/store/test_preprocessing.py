import io
import json
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.errors import MalformedImage, NotAnImage, ServiceError, TooManyPixels, status_and_code
from app.store.manifest import Input
from app.store.preprocessing import FORMATS, decode_image, limit_pillow, resized_size
from tests.app import odd_images
from tests.app.odd_images import encode, exif_bytes, make_photo, make_png, png_chunk
from tests.app.tiny_store import make_input

MAX_PIXELS = 50_000_000
# Pillow warns about metadata that is not read here; `limit_pillow` sets the same filters in the service.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def make_rule(**changes: object) -> Input:
    return Input.model_validate_json(json.dumps({**make_input(side=16), **changes}))


RULE = make_rule()


def reference(image: Image.Image) -> np.ndarray:
    """Resize and crop an upright RGB image by the rule, implemented independently of the service."""
    width, height = image.size
    shorter = min(width, height)
    size = (int(width * 16 / shorter + 0.5), int(height * 16 / shorter + 0.5))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
    return pixels[top : top + 16, left : left + 16]


@pytest.mark.parametrize(("name", "data"), odd_images.ordinary_images().items(), ids=lambda value: str(value)[:40])
def test_decode_image_returns_contiguous_uint8_for_every_kind(name: str, data: bytes) -> None:
    pixels = decode_image(data, RULE, MAX_PIXELS)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_decode_image_resizes_and_crops_by_the_rule(kind: str) -> None:
    photo = make_photo(61, 43)
    np.testing.assert_array_equal(decode_image(encode(photo, kind), RULE, MAX_PIXELS), reference(photo))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image_applies_orientation_once(kind: str, orientation: int) -> None:
    photo, options = make_photo(16, 16), {"lossless": True} if kind == "WEBP" else {}
    turned = decode_image(encode(photo, kind, exif=exif_bytes(orientation), **options), RULE, MAX_PIXELS)
    plain = decode_image(encode(photo, kind, **options), RULE, MAX_PIXELS)
    flips = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain.transpose(1, 0, 2)[:, ::-1],
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain.transpose(1, 0, 2)[::-1],
    }
    assert [key for key in flips if np.array_equal(turned, flips[key])] == [orientation]


def test_decode_image_orients_before_it_crops() -> None:
    wide = Image.new("RGB", (48, 16), "blue")
    wide.paste("red", (16, 0, 32, 16))
    pixels = decode_image(encode(wide, "PNG", exif=exif_bytes(6)), RULE, MAX_PIXELS)
    assert pixels.reshape(-1, 3).tolist() == [[255, 0, 0]] * 256


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", exif_bytes(1)[:-9], exif_bytes(99)]
)
def test_decode_image_ignores_broken_exif(exif: bytes) -> None:
    photo = make_photo()
    data = encode(photo, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, RULE, MAX_PIXELS), reference(photo))


def test_decode_image_composites_alpha_over_the_background() -> None:
    image = Image.new("RGBA", (16, 16), (200, 100, 0, 51))
    pixels = decode_image(encode(image, "PNG"), make_rule(alpha_background=[0, 10, 250]), MAX_PIXELS)
    assert pixels[0, 0].tolist() == [40, 28, 200]


def test_decode_image_composites_a_transparent_palette_entry() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    image.paste(0, (0, 0, 16, 8))
    pixels = decode_image(encode(image, "PNG", transparency=0), RULE, MAX_PIXELS)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[15, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode_image_takes_the_high_byte_of_16_bit_grey(kind: str) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    pixels = decode_image(encode(Image.fromarray(values), kind), RULE, MAX_PIXELS)
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_decode_image_reads_big_endian_16_bit_tiff() -> None:
    data = encode(Image.frombytes("I;16B", (16, 16), struct.pack(">256H", *range(0, 65536, 256))), "TIFF")
    pixels = decode_image(data, RULE, MAX_PIXELS)
    np.testing.assert_array_equal(pixels[..., 2].ravel(), np.arange(256))


def test_decode_image_composites_the_transparent_value_of_16_bit_grey() -> None:
    rows = b"".join(b"\0" + struct.pack(">16H", *[300] * 8, *[301] * 8) for _ in range(16))
    data = make_png(16, 16, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 300)))
    pixels = decode_image(data, RULE, MAX_PIXELS)
    assert pixels[0, :, 0].tolist() == [255] * 8 + [1] * 8


def test_decode_image_takes_the_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data, RULE, MAX_PIXELS)[8, 8].tolist() == [255, 0, 0], kind


def test_decode_image_shrinks_large_jpeg_while_decoding_but_never_below_the_draft_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    load = Image.Image.resize

    def record(self: Image.Image, *arguments: object, **options: object) -> Image.Image:
        sizes.append(self.size)
        return load(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", record)
    decode_image(encode(make_photo(1600, 400), "JPEG"), RULE, MAX_PIXELS)
    # 1/8; the minimum is 2 x 16.
    assert sizes[-1] == (200, 50)
    decode_image(encode(make_photo(1600, 255), "JPEG"), RULE, MAX_PIXELS)
    assert sizes[-1] == (400, 64)


@pytest.mark.parametrize(("name", "case"), odd_images.refused_images().items(), ids=lambda value: str(value)[:40])
def test_decode_image_refuses_with_the_right_status(name: str, case: tuple[bytes, int]) -> None:
    with pytest.raises(ServiceError) as caught:
        decode_image(case[0], RULE, 900_000)
    assert status_and_code(caught.value)[0] == case[1], (name, caught.value.detail)


@pytest.mark.parametrize(("name", "data"), list(odd_images.truncated_images()), ids=lambda value: str(value)[:40])
def test_decode_image_refuses_truncated_images(name: str, data: bytes) -> None:
    with pytest.raises((MalformedImage, NotAnImage)):
        decode_image(data, RULE, MAX_PIXELS)


def test_decode_image_checks_pixels_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(TooManyPixels) as caught:
        decode_image(encode(make_photo(100, 101), "PNG"), RULE, 100 * 100)
    assert caught.value.members == {"width": 100, "height": 101, "max_pixels": 10_000}


@pytest.mark.parametrize("max_pixels", [16 * 16, 16 * 16 - 1])
def test_decode_image_accepts_up_to_the_limit(max_pixels: int) -> None:
    data = encode(make_photo(16, 16), "PNG")
    if max_pixels == 256:
        assert decode_image(data, RULE, max_pixels).shape == (16, 16, 3)
    else:
        with pytest.raises(TooManyPixels):
            decode_image(data, RULE, max_pixels)


def test_limit_pillow_sets_its_limit_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit_pillow(900)
        assert decode_image(encode(make_photo(30, 30), "PNG"), RULE, 900).shape == (16, 16, 3)
        with pytest.raises(TooManyPixels):
            decode_image(odd_images.webp_header(31, 31), RULE, 900)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((61, 43), (23, 16)), ((43, 61), (16, 23)), ((16, 16), (16, 16)), ((32, 33), (16, 17)), ((1, 1), (16, 16))],
)
def test_resized_size_rounds_half_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, RULE) == expected


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(FORMATS), st.integers(0, 2**32 - 1))
def test_decode_image_handles_any_corruption(noise: bytes, kind: str, seed: int) -> None:
    data = bytearray(encode(make_photo(20, 20), kind))
    rng = np.random.default_rng(seed)
    for byte in noise[:8]:
        data[int(rng.integers(len(data)))] = byte
    for candidate in (bytes(data), bytes(data[:20]) + noise, noise):
        try:
            pixels = decode_image(candidate, RULE, 1_000_000)
        except ServiceError:
            continue
        assert pixels.shape == (16, 16, 3)


def test_decode_image_reads_exactly_the_listed_formats() -> None:
    for kind in FORMATS:
        assert Image.open(io.BytesIO(encode(make_photo(), kind))).format == kind
    with pytest.raises(NotAnImage) as caught:
        decode_image(encode(make_photo(), "TGA"), RULE, MAX_PIXELS)
    assert caught.value.members["accepted"] == list(FORMATS)
