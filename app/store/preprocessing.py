"""Preprocessing: from an image file to the pixels of a model's input, by the rule in its manifest.

Training implements the same rule independently; a contract test checks that both are bit-identical.
"""

import io
import logging
import warnings
from collections.abc import Callable

import numpy as np

# Plugins register themselves. Without these imports, Pillow would import all of its plugins at the first request.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from app.backends import Pixels
from app.errors import MalformedImage, NotAnImage, ServiceError, TooManyPixels
from app.store.manifest import Input

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
START_OF_SCAN = b"\xff\xda"
# Encoders write about ten.
MAX_SCANS = 200
UNDEFINED_RANGE = {"I": "signed or 32-bit integer", "F": "float"}


def limit_pillow(max_pixels: int) -> None:
    """Set Pillow's own pixel limit, which some formats check before they allocate memory.

    Pillow warns above its limit and raises only above twice the limit, so the limit is halved and the warning ignored.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # Warnings about broken metadata.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, rule: Input, max_pixels: int) -> Pixels:
    """Decode, orient, flatten, resize and crop one image.

    Shapes: (H, W, 3), C-contiguous.
    Raises: NotAnImage, MalformedImage, TooManyPixels. No other exception, for any input.
    """
    try:
        return _decode(data, rule, max_pixels)
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


def _decode(data: bytes, rule: Input, max_pixels: int) -> Pixels:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _require_size(image.width, image.height, rule, max_pixels)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            _require_few_scans(image, data)
            min_side = rule.jpeg_draft_scale * rule.resize_shorter_side
            image.draft(None, (min_side, min_side))
        image.load()
        return _crop(_resize(_flatten(_orient(image), rule.alpha_background), rule), rule)


def _has_known_signature(data: bytes) -> bool:
    accepts: list[Callable[[bytes], bool | str] | None] = [Image.OPEN[name][1] for name in FORMATS]
    return any(accept is not None and accept(data[:16]) is True for accept in accepts)


def _require_size(width: int, height: int, rule: Input, max_pixels: int) -> None:
    """Check the size in the header, before decoding, and the size after resizing: a 1 x 5000 strip becomes large."""
    if width < 1 or height < 1:
        raise MalformedImage("The image has no pixels.", width=width, height=height)
    sizes = {"has": (width, height), "would be resized to": resized_size(width, height, rule.resize_shorter_side)}
    for verb, (w, h) in sizes.items():
        if w * h > max_pixels:
            detail = f"The image {verb} {w} x {h} pixels; the limit is {max_pixels}."
            raise TooManyPixels(detail, width=width, height=height, max_pixels=max_pixels)


def _require_few_scans(image: Image.Image, data: bytes) -> None:
    """Refuse a progressive JPEG with too many scans: 69 bytes of it can cost a pass over all pixels."""
    if image.info.get("progressive") and data.count(START_OF_SCAN) > MAX_SCANS:
        raise MalformedImage(f"The JPEG has more than {MAX_SCANS} scans.", max_scans=MAX_SCANS)


def resized_size(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Scale to the shorter side; round the longer one half up, in integer arithmetic."""
    shorter, longer = min(width, height), max(width, height)
    other = (2 * longer * shorter_side + shorter) // (2 * shorter)
    return (shorter_side, other) if width <= height else (other, shorter_side)


def _orient(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore invalid EXIF. Pillow has already rotated TIFF files while loading."""
    try:
        transposition = TRANSPOSITIONS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001 (Pillow raises many types)
        logger.debug("ignored invalid EXIF: %r", error)
        return image
    return image if transposition is None else image.transpose(transposition)


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert any mode to RGB; composite alpha over the background."""
    if image.mode.startswith("I;16"):
        image = _take_high_byte(image)
    if image.mode in UNDEFINED_RANGE:
        raise NotAnImage(f"Unsupported pixel type ({UNDEFINED_RANGE[image.mode]}): its value range is undefined.")
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
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _resize(image: Image.Image, rule: Input) -> Image.Image:
    size = resized_size(image.width, image.height, rule.resize_shorter_side)
    return image if image.size == size else image.resize(size, Image.Resampling[rule.interpolation.upper()])


def _crop(image: Image.Image, rule: Input) -> Pixels:
    left, top = (image.width - rule.width) // 2, (image.height - rule.height) // 2
    return np.array(image.crop((left, top, left + rule.width, top + rule.height)), dtype=np.uint8)
