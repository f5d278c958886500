"""Preprocessing: from an image file to the pixels of a graph, by a rule that the manifest states.

The service implements the same rule, with bit-identical results. Steps: decode the first frame with
Pillow, where JPEG may shrink while decoding (`draft`) to no less than `jpeg_draft_scale` times the
target side; apply the EXIF orientation; reduce 16-bit grey to its high byte; blend transparency
with a background colour; resize the shorter side; crop the centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted file formats. Pillow reads MPO as JPEG."""
_UNDEFINED_RANGE = ("I", "F")
"""Pillow modes of 32-bit integers and floats, whose value range is undefined."""


@dataclass(frozen=True)
class InputRule:
    """The manifest's `input`.

    Units: sides in pixels; mean and std of channel values scaled to 0 … 1
    """

    height: int
    width: int
    resize_shorter_side: int
    interpolation: str = "bicubic"
    jpeg_draft_scale: int = 2
    alpha_background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.resize_shorter_side < max(self.height, self.width):
            raise ValueError(
                f"resize_shorter_side {self.resize_shorter_side} is smaller than the crop {self.height}x{self.width}"
            )
        if self.interpolation.upper() not in Image.Resampling.__members__:
            raise ValueError(
                f"interpolation {self.interpolation!r}: expected {', '.join(Image.Resampling.__members__)}"
            )


def read_pixels(source: Path | BinaryIO, rule: InputRule) -> NDArray[np.uint8]:
    """Decode, orient, resize and crop an image file. Shapes: returns uint8 (height, width, 3).

    Raises: OSError where Pillow cannot read the file; ValueError where the value range of its
        pixels is undefined.
    """
    with Image.open(source, formats=FORMATS) as image:
        minimum = rule.jpeg_draft_scale * rule.resize_shorter_side
        # JPEG only: decode at 1/2, 1/4 or 1/8 of the size, but not below the minimum.
        image.draft(None, (minimum, minimum))
        image.load()
        return _cropped(_rgb(_upright(image), rule.alpha_background), rule)


def read_whole(source: Path) -> Image.Image:
    """Decode and orient an image file as `read_pixels` does, in RGB at full size.

    Raises: as `read_pixels`.
    """
    with Image.open(source, formats=FORMATS) as image:
        image.load()
        return _rgb(_upright(image), InputRule.alpha_background)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore invalid EXIF."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - broken metadata raises many kinds of errors
        return image


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _by_high_byte(image)
    if image.mode in _UNDEFINED_RANGE:
        raise ValueError(f"unsupported pixel type (mode {image.mode}): its value range is undefined")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        ground = Image.new("RGBA", coloured.size, (*background, 255))
        return Image.alpha_composite(ground, coloured).convert("RGB")
    return image.convert("RGB")


def _by_high_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits, including the value that a PNG declares transparent."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _cropped(image: Image.Image, rule: InputRule) -> NDArray[np.uint8]:
    shorter, target = min(image.size), rule.resize_shorter_side
    width, height = ((2 * side * target + shorter) // (2 * shorter) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[rule.interpolation.upper()])
    left, top = (image.width - rule.width) // 2, (image.height - rule.height) // 2
    return np.array(image.crop((left, top, left + rule.width, top + rule.height)), dtype=np.uint8)
