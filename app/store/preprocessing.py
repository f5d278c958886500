"""Preprocessing: from an image file to the pixels of a model's input, by the rule in its manifest.

Training implements the same rule independently; a contract test checks that both are bit-identical.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np

# Plugins register themselves. Without these imports, Pillow would import all of its plugins at the first request.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from app.backends import Pixels
from app.errors import MalformedImage, NotAnImage, ServiceError, TooManyPixels
from app.store.image_cost import DecodingCost, Shape, Size, bytes_after_loading, estimate, estimate_webp
from app.store.image_structure import MAX_JPEG_SCANS, check_structure, find_first_scan, require_few_scans
from app.store.manifest import Input
from app.system.libtiff import silence_libtiff

logger = logging.getLogger(__name__)

# Pillow opens MPO files through its JPEG plugin.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS = {TRANSPOSITIONS[orientation] for orientation in (5, 6, 7, 8)}
# Keys of Pillow's `info` that may have an orientation.
EXIF_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
# All texts of a PNG together, uncompressed.
MAX_TEXT_BYTES = 4_000_000
UNDEFINED_RANGE = {"I": "signed or 32-bit integer", "F": "float"}


def limit_pillow(max_pixels: int) -> None:
    """Set Pillow's own limits, such as that on pixels, which some formats check before they allocate memory.

    Pillow warns above its limit and raises only above twice the limit, so the limit is halved and the warning ignored.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    silence_libtiff()
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    # libtiff reads this at every JPEG in a TIFF.
    os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", str(MAX_JPEG_SCANS))
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # Warnings about broken metadata.
    warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class DecodeLimits:
    """max_bytes: estimated memory while decoding one image."""

    max_pixels: int
    max_bytes: int = sys.maxsize


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header is read. `decode` raises nothing but ServiceError; call it once."""

    cost: DecodingCost
    decode: Callable[[], Pixels]


def decode_image(data: bytes, rule: Input, max_pixels: int) -> Pixels:
    """Decode, orient, flatten, resize and crop one image.

    Shapes: (H, W, 3), C-contiguous.
    Raises: NotAnImage, MalformedImage, TooManyPixels. No other exception, for any input.
    """
    return open_image(data, rule, DecodeLimits(max_pixels)).decode()


def open_image(data: bytes, rule: Input, limits: DecodeLimits) -> OpenedImage:
    """Read the header, and estimate what decoding costs. Allocates no pixels.

    Raises: NotAnImage, MalformedImage, TooManyPixels. No other exception, for any input.
    """
    with _translated_errors(data, limits.max_pixels):
        check_structure(data)
        opening = _open_webp(data, rule, limits) if _is_webp(data) else _open(data, rule, limits)
        _require_bytes(opening.cost.n_bytes, opening.shape.size, limits.max_bytes)

    def decode() -> Pixels:
        with _translated_errors(data, limits.max_pixels):
            return _decode(opening.load(), rule, opening, limits)

    return OpenedImage(opening.cost, decode)


@dataclass
class _Opening:
    """image: None for a format that allocates pixels when it is opened."""

    data: bytes
    shape: Shape
    cost: DecodingCost
    image: ImageFile.ImageFile | None = None

    def load(self) -> Image.Image:
        """Load the pixels, and forget the image, so that later steps can free it."""
        image = self.image or Image.open(io.BytesIO(self.data), formats=FORMATS)
        self.image = None
        if image.width > self.shape.size[0] or image.height > self.shape.size[1]:
            raise MalformedImage("The image is larger than its header says.")
        image.load()
        return image


def _open_webp(data: bytes, rule: Input, limits: DecodeLimits) -> _Opening:
    """Read the size without Pillow, which would allocate two canvases."""
    size = WebPImagePlugin._get_size(data[:30])
    if size is None:
        raise MalformedImage("The image header is corrupt or truncated.")
    shape = _measure(size, data, rule, limits)
    return _Opening(data, shape, estimate_webp(shape))


def _open(data: bytes, rule: Input, limits: DecodeLimits) -> _Opening:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    shape, n_scans = _measure(image.size, data, rule, limits), 0
    _require_defined_range(image)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        n_scans = _count_buffered_scans(image, data)
        image.draft(None, _draft_size(image.size, rule))
    return _Opening(data, shape, estimate(image, shape, n_scans, _may_turn(image)), image)


def _may_turn(image: Image.Image) -> bool:
    """Tell whether there is metadata that may have an orientation. Reading it could load the pixels of a PNG."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(ORIENTATION, 1) != 1:
        return True
    return not EXIF_KEYS.isdisjoint(image.info)


def _measure(size: tuple[int, int], data: bytes, rule: Input, limits: DecodeLimits) -> Shape:
    _require_size(*size, rule, limits.max_pixels)
    return Shape(size, largest_resized_size(size, rule), len(data))


def _count_buffered_scans(image: JpegImagePlugin.JpegImageFile, data: bytes) -> int:
    """Return the number of scans if libjpeg keeps all coefficients until the last one; else 0.

    Raises: MalformedImage for too many scans.
    """
    start = find_first_scan(data)
    n_components = data[start + 4] if start + 4 < len(data) else 0
    is_buffered = bool(image.info.get("progressive")) or n_components < image.layers
    return require_few_scans(data) if is_buffered else 0


def _decode(image: Image.Image, rule: Input, opening: _Opening, limits: DecodeLimits) -> Pixels:
    """Orient, flatten, resize and crop. No name keeps the image of an earlier step, so that its memory is freed."""
    transposition = _read_orientation(image)
    # Metadata after the pixels can turn the image, or make it transparent.
    needed_bytes = bytes_after_loading(image, opening.shape.resized, is_turned=transposition is not None)
    if needed_bytes > opening.cost.n_bytes:
        _require_bytes(needed_bytes, image.size, opening.cost.n_bytes)
    size = resized_size(_full_size(image, opening.shape.size, transposition, rule), rule)
    if transposition is not None:
        image = image.transpose(transposition)
    image = _flatten(image, rule.alpha_background)
    if image.size != size:
        image = image.resize(size, Image.Resampling[rule.interpolation.upper()])
    return _crop(image, rule)


def _full_size(image: Image.Image, size: Size, transposition: Image.Transpose | None, rule: Input) -> Size:
    """Return the upright size from which the resized one follows: that before the draft of a JPEG.

    size: by the header. A resize_shorter_side follows from the draft, which rounds its sides up.
    """
    is_drafted = isinstance(image, JpegImagePlugin.JpegImageFile) and rule.resize_shorter_side is None
    width, height = size if is_drafted else image.size
    return (height, width) if transposition in SWAPS else (width, height)


@contextmanager
def _translated_errors(data: bytes, max_pixels: int) -> Iterator[None]:
    """Raises: NotAnImage, MalformedImage, TooManyPixels. No other exception."""
    try:
        yield
    except ServiceError:
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"The image has more than {max_pixels} pixels.", max_pixels=max_pixels) from error
    except UnidentifiedImageError as error:
        if _has_known_signature(data):
            raise MalformedImage("The image header is corrupt or truncated.") from error
        detail = "Not an image in a supported format."
        raise NotAnImage(detail, accepted=list(FORMATS)) from error
    except Exception as error:
        # Pillow raises many types, by format and defect.
        logger.debug("refused image: %r", error)
        raise MalformedImage("The image is corrupt or truncated.") from error


def _is_webp(data: bytes) -> bool:
    return WebPImagePlugin._accept(data[:16]) is True


def _has_known_signature(data: bytes) -> bool:
    accepts: list[Callable[[bytes], bool | str] | None] = [Image.OPEN[name][1] for name in FORMATS]
    return any(accept is not None and accept(data[:16]) is True for accept in accepts)


def _require_size(width: int, height: int, rule: Input, max_pixels: int) -> None:
    """Check the size in the header, before decoding, and the size after resizing: a 1 x 5000 strip becomes large."""
    if width < 1 or height < 1:
        raise MalformedImage("The image has no pixels.", width=width, height=height)
    sizes = {"has": (width, height), "would be resized to": largest_resized_size((width, height), rule)}
    for verb, (w, h) in sizes.items():
        if w * h > max_pixels:
            detail = f"The image {verb} {w} x {h} pixels; the limit is {max_pixels}."
            raise TooManyPixels(detail, width=width, height=height, max_pixels=max_pixels)


def _require_bytes(n_bytes: int, size: tuple[int, int], max_bytes: int) -> None:
    if n_bytes > max_bytes:
        width, height = size
        detail = (
            f"Decoding the image of {width} x {height} pixels would take {n_bytes} bytes; the limit is {max_bytes}."
        )
        raise TooManyPixels(detail, width=width, height=height, n_bytes=n_bytes, max_bytes=max_bytes)


def _require_defined_range(image: Image.Image) -> None:
    if image.mode in UNDEFINED_RANGE:
        raise NotAnImage(f"Unsupported pixel type ({UNDEFINED_RANGE[image.mode]}): its value range is undefined.")


def resized_size(size: Size, rule: Input) -> Size:
    """Return (width, height) after resizing an upright image.

    Source: timm's `transforms_imagenet_eval` and torchvision's `Resize`, with their roundings.
    """
    width, height = size
    shorter = min(size)
    if rule.resize_shorter_side is not None:
        # Round half up, in integer arithmetic.
        side = rule.resize_shorter_side
        return (2 * width * side + shorter) // (2 * shorter), (2 * height * side + shorter) // (2 * shorter)
    target_width, target_height = cast(int, rule.resize_width), cast(int, rule.resize_height)
    if rule.crop == "squash":
        return target_width, target_height
    if rule.crop == "center" and target_width == target_height:
        return width * target_width // shorter, height * target_width // shorter
    ratios = width / target_width, height / target_height
    ratio = min(ratios) if rule.crop == "center" else max(ratios)
    # A strip keeps one pixel, where timm fails.
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def largest_resized_size(size: Size, rule: Input) -> Size:
    """Return an upper bound of each side after resizing, whether or not the orientation swaps them."""
    upright, turned = resized_size(size, rule), resized_size(size[::-1], rule)
    return max(upright[0], turned[1]), max(upright[1], turned[0])


def _draft_size(size: Size, rule: Input) -> Size:
    """Return the least size of a JPEG draft."""
    side = rule.resize_shorter_side
    width, height = largest_resized_size(size, rule) if side is None else (side, side)
    return rule.jpeg_draft_scale * width, rule.jpeg_draft_scale * height


def _read_orientation(image: Image.Image) -> Image.Transpose | None:
    """Read the EXIF orientation; ignore invalid EXIF. Pillow has already rotated TIFF files while loading."""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001 (Pillow raises many types)
        logger.debug("ignored invalid EXIF: %r", error)
        return None


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert any mode to RGB; composite alpha over the background."""
    if image.mode.startswith("I;16"):
        image = _take_high_byte(image)
    _require_defined_range(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if not image.has_transparency_data:
        return _as_mode(image, "RGB")
    image = _as_mode(image, "RGBA")
    composite = Image.new("RGB", image.size, background)
    # Bit-identical to alpha_composite, in half the memory.
    composite.paste(image, mask=image)
    return composite


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert; return the image itself if it has the mode, where Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)


def _take_high_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits; Pillow's conversion would clip values above 255 to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    # One of the 65,536 grey levels may stand for transparency.
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255))))
    return grey


def _crop(image: Image.Image, rule: Input) -> Pixels:
    """Crop the centre, or pad around it."""
    left, top = _margin(image.width, rule.width, rule), _margin(image.height, rule.height, rule)
    if image.width < rule.width or image.height < rule.height:
        canvas = Image.new("RGB", (rule.width, rule.height), tuple(round(255 * value) for value in rule.mean))
        canvas.paste(image, (-left, -top))
        return np.array(canvas, dtype=np.uint8)
    return np.array(image.crop((left, top, left + rule.width, top + rule.height)), dtype=np.uint8)


def _margin(side: int, target: int, rule: Input) -> int:
    """Return what is cropped before the centre; below 0, what is padded."""
    if side < target:
        return -((target - side) // 2)
    # timm's crop rounds halves to even, as Python does.
    return (side - target) // 2 if rule.resize_shorter_side is not None else round((side - target) / 2)
