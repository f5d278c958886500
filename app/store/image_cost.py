"""Image cost: what decoding an image takes, estimated from its header. Pure functions.

It does not follow from the size of the file: 46 bytes of WebP can take 750 MB. The memory is an upper bound of the
peak, so that the sum over several images holds. The time is a rough estimate, which only orders images.
"""

import math
from dataclasses import dataclass

from PIL import BmpImagePlugin, Image, JpegImagePlugin, TiffImagePlugin

# Buffers of the libraries, and metadata.
FIXED_BYTES = 3_000_000
# Pillow stores a pixel of these modes in fewer bytes than the 4 of all others.
SMALL_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
FULL_BYTES = 4
# 16-bit grey and its copies in NumPy; with a transparent value.
DEEP_BYTES, DEEP_TRANSPARENT_BYTES = 8, 12
# libwebp has two canvases and the frame; Pillow a copy of it and the image.
WEBP_BYTES = 17
COEFFICIENT_BYTES = 2
# JPEG in TIFF: the raster of YCbCr, and the coefficients of all scans.
TIFF_JPEG_BYTES = 4 + 8
TIFF_JPEGS, YCBCR = {6, 7}, 6
# LZMA and Zstandard keep what they have written, and have a dictionary.
TIFF_COPIES, TIFF_DICTIONARY_BYTES = {34925, 50000}, 9_000_000
BMP_RUN_BYTES = 3
# Measured on one core of an AMD EPYC, rounded up.
SECONDS_PER_PIXEL = {"JPEG": 1e-9, "MPO": 1e-9}
OTHER_SECONDS_PER_PIXEL = 30e-9
SECONDS_PER_COEFFICIENT = 0.4e-9
SECONDS_PER_BYTE = 20e-9
SECONDS_PER_RUN_BYTE = 0.3e-6
SECONDS_PER_RESIZED_PIXEL = 5e-9

Size = tuple[int, int]


@dataclass(frozen=True)
class DecodingCost:
    """n_pixels: by the header. n_bytes: peak memory, without the file itself. Units: seconds of one core."""

    n_pixels: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Shape:
    """size: by the header. resized: at most, before it is cropped."""

    size: Size
    resized: Size
    n_file_bytes: int

    @property
    def n_pixels(self) -> int:
        return math.prod(self.size)


def estimate_webp(shape: Shape) -> DecodingCost:
    """Estimate the cost before the file is opened, which already allocates two canvases."""
    peak_bytes = max(WEBP_BYTES * shape.n_pixels, _resizing_bytes(shape.size, shape.resized))
    return DecodingCost(shape.n_pixels, FIXED_BYTES + peak_bytes, _pixel_seconds("WEBP", shape))


def estimate(image: Image.Image, shape: Shape, n_scans: int, may_turn: bool) -> DecodingCost:
    """Estimate the cost of an opened image; a JPEG is already in draft mode.

    n_scans: of a JPEG whose coefficients are all kept in memory; else 0.
    may_turn: whether it has metadata that may have an orientation.
    """
    n_coefficients = _count_coefficients(image, shape.size) if n_scans else 0
    # Pillow turns a TIFF while its decoder still has its buffers.
    loading_bytes = (1 + may_turn) * _stored_bytes(image) + COEFFICIENT_BYTES * n_coefficients + _decoder_bytes(image)
    peak_bytes = max(loading_bytes, bytes_after_loading(image, shape.resized, may_turn))
    seconds = _pixel_seconds(image.format or "", shape) + n_coefficients * n_scans * SECONDS_PER_COEFFICIENT
    if _has_runs(image):
        seconds += shape.n_file_bytes * SECONDS_PER_RUN_BYTE
    return DecodingCost(shape.n_pixels, FIXED_BYTES + peak_bytes, seconds)


def bytes_after_loading(image: Image.Image, resized: Size, is_turned: bool) -> int:
    """Return the peak memory of turning, flattening and resizing."""
    n_pixels, stored_bytes = math.prod(image.size), _stored_bytes(image)
    turning_bytes = 2 * stored_bytes if is_turned else stored_bytes
    return max(turning_bytes, _flat_bytes(image) * n_pixels, _resizing_bytes(image.size, resized))


def _flat_bytes(image: Image.Image) -> int:
    """Return the bytes per pixel while an image is converted to RGB."""
    if image.mode.startswith("I;16"):
        return DEEP_TRANSPARENT_BYTES if image.has_transparency_data else DEEP_BYTES
    stored = SMALL_MODES.get(image.mode, FULL_BYTES)
    if image.has_transparency_data:
        return 2 * FULL_BYTES + (0 if image.mode == "RGBA" else stored)
    return stored if image.mode == "RGB" else stored + FULL_BYTES


def _resizing_bytes(size: Size, resized: Size) -> int:
    """Return the memory of the image, the image of the new width, and the resized image."""
    return FULL_BYTES * (math.prod(size) + _count_halfway(size, resized) + math.prod(resized))


def _count_halfway(size: Size, resized: Size) -> int:
    """Count the pixels after the first of two passes, for an image that may be turned."""
    return max(resized[0] * size[1], resized[1] * size[0])


def _stored_bytes(image: Image.Image) -> int:
    return math.prod(image.size) * SMALL_MODES.get(image.mode, FULL_BYTES)


def _decoder_bytes(image: Image.Image) -> int:
    if _has_runs(image):
        return BMP_RUN_BYTES * math.prod(image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile[0].codec_name == "libtiff":
        return _strip_bytes(image)
    return 0


def _has_runs(image: Image.Image) -> bool:
    return isinstance(image, BmpImagePlugin.BmpImageFile) and image.tile[0].codec_name == "bmp_rle"


def _strip_bytes(image: TiffImagePlugin.TiffImageFile) -> int:
    """Return the memory of one strip or tile, which may be larger than the image."""
    tags = image.tag_v2
    width = tags.get(TiffImagePlugin.TILEWIDTH, image.width)
    height = tags.get(
        TiffImagePlugin.TILELENGTH, min(tags.get(TiffImagePlugin.ROWSPERSTRIP, image.height), image.height)
    )
    n_sample_bits = sum(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    n_bytes = math.ceil(max(n_sample_bits, tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)) / 8)
    compression = tags.get(TiffImagePlugin.COMPRESSION)
    if compression in TIFF_COPIES:
        return int(2 * n_bytes * width * height + TIFF_DICTIONARY_BYTES)
    if compression in TIFF_JPEGS or tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == YCBCR:
        n_bytes += TIFF_JPEG_BYTES
    return int(n_bytes * width * height)


def _count_coefficients(image: Image.Image, size: Size) -> int:
    """Count the coefficients of all components, in whole blocks. `layer` has the sampling factors of each."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 0
    max_h = max(h for _, h, _, _ in image.layer)
    max_v = max(v for _, _, v, _ in image.layer)
    n_blocks = math.ceil(size[0] / (8 * max_h)) * math.ceil(size[1] / (8 * max_v))
    return 64 * n_blocks * sum(h * v for _, h, v, _ in image.layer)


def _pixel_seconds(image_format: str, shape: Shape) -> float:
    n_resized = _count_halfway(shape.size, shape.resized) + math.prod(shape.resized)
    return (
        shape.n_pixels * SECONDS_PER_PIXEL.get(image_format, OTHER_SECONDS_PER_PIXEL)
        + shape.n_file_bytes * SECONDS_PER_BYTE
        + n_resized * SECONDS_PER_RESIZED_PIXEL
    )
