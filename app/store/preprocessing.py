"""Images: a file's bytes become the pixels that a model reads, as its manifest says.

Both halves implement this rule independently, and a test holds them to the same bits.
"""

import io
import logging
import warnings
from collections.abc import Callable

import numpy as np

# The plugins register themselves; naming them keeps Pillow from importing its other forty at the first request.
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

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # MPO files are opened by way of JPEG
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
MAX_SCANS = 200  # encoders write about ten
UNDEFINED_RANGE = {"I": "signed or 32-bit integers", "F": "floating point numbers"}


def limit_pillow(max_pixels: int) -> None:
    """Put our pixel cap in the place of Pillow's own, which some formats check before they allocate anything.

    Pillow raises at twice its limit and warns from there down to the limit; only the first is wanted.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about broken metadata, once for each line of Pillow


def decode_image(data: bytes, rule: Input, max_pixels: int) -> Pixels:
    """Decode, orient, flatten, resize and crop one image.

    Shapes: (H, W, 3), C-contiguous.
    Raises: NotAnImage, MalformedImage, TooManyPixels. Nothing else, whatever the bytes.
    """
    try:
        return _decode(data, rule, max_pixels)
    except ServiceError:
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"The image has more than {max_pixels} pixels.", max_pixels=max_pixels) from error
    except UnidentifiedImageError as error:
        if _begins_like_an_image(data):
            raise MalformedImage("The header of the image is broken or cut off.") from error
        detail = "The bytes are not an image in a format that is read here."
        raise NotAnImage(detail, accepted=list(FORMATS)) from error
    except Exception as error:  # a dozen kinds of it, by format and by what is broken
        logger.debug("refused an image: %r", error)
        raise MalformedImage("The image is cut off or broken.") from error


def _decode(data: bytes, rule: Input, max_pixels: int) -> Pixels:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _require_size(image.width, image.height, rule, max_pixels)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            _require_few_scans(image, data)
            least = rule.jpeg_draft_scale * rule.resize_shorter_side
            image.draft(None, (least, least))
        image.load()
        return _crop(_resize(_flatten(_orient(image), rule.alpha_background), rule), rule)


def _begins_like_an_image(data: bytes) -> bool:
    accepts: list[Callable[[bytes], bool | str] | None] = [Image.OPEN[name][1] for name in FORMATS]
    return any(accept is not None and accept(data[:16]) is True for accept in accepts)


def _require_size(width: int, height: int, rule: Input, max_pixels: int) -> None:
    """Refuse by the header, before any pixel is decoded; a strip of 1 x 5000 is small, but not once it is resized."""
    if width < 1 or height < 1:
        raise MalformedImage("The image has no pixels.", width=width, height=height)
    sizes = {"has": (width, height), "would be resized to": resized_size(width, height, rule.resize_shorter_side)}
    for verb, (w, h) in sizes.items():
        if w * h > max_pixels:
            detail = f"The image {verb} {w} x {h} pixels, more than {max_pixels}."
            raise TooManyPixels(detail, width=width, height=height, max_pixels=max_pixels)


def _require_few_scans(image: Image.Image, data: bytes) -> None:
    """Refuse a progressive JPEG that goes on for ever: each 69 bytes of it can cost a pass over all its pixels."""
    if image.info.get("progressive") and data.count(START_OF_SCAN) > MAX_SCANS:
        raise MalformedImage(f"The JPEG has more than {MAX_SCANS} scans.", max_scans=MAX_SCANS)


def resized_size(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Scale so that the shorter side fits; the other is rounded half up, in whole numbers."""
    shorter, longer = min(width, height), max(width, height)
    other = (2 * longer * shorter_side + shorter) // (2 * shorter)
    return (shorter_side, other) if width <= height else (other, shorter_side)


def _orient(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; EXIF that cannot be read is ignored. TIFF files were turned while loading."""
    try:
        transposition = TRANSPOSITIONS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001 (as many kinds as there are ways to break it)
        logger.debug("ignored broken EXIF: %r", error)
        return image
    return image if transposition is None else image.transpose(transposition)


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Turn any mode into RGB, alpha composited over the background."""
    if image.mode.startswith("I;16"):
        image = _take_high_byte(image)
    if image.mode in UNDEFINED_RANGE:
        raise NotAnImage(f"The pixels are {UNDEFINED_RANGE[image.mode]}, of which no one says what is white.")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if not image.has_transparency_data:
        return _as_mode(image, "RGB")
    image = _as_mode(image, "RGBA")
    ground = Image.new("RGB", image.size, background)
    ground.paste(image, mask=image)  # to the bit what alpha_composite gives, in half the memory
    return ground


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert without the copy that Pillow makes of what is in the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _take_high_byte(image: Image.Image) -> Image.Image:
    """Make 8 bits of 16-bit grey; Pillow's own conversion would turn all above 255 to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one of the 65,536 greys stands for nothing
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _resize(image: Image.Image, rule: Input) -> Image.Image:
    size = resized_size(image.width, image.height, rule.resize_shorter_side)
    return image if image.size == size else image.resize(size, Image.Resampling[rule.interpolation.upper()])


def _crop(image: Image.Image, rule: Input) -> Pixels:
    left, top = (image.width - rule.width) // 2, (image.height - rule.height) // 2
    return np.array(image.crop((left, top, left + rule.width, top + rule.height)), dtype=np.uint8)
