"""Preprocessing: from an image file to the pixels of a graph, by a rule that the manifest states.

The service implements the same rule, with bit-identical results. Steps: decode the first frame with
Pillow, where JPEG may shrink while decoding (`draft`) to no less than `jpeg_draft_scale` times the
resized side; apply the EXIF orientation; reduce 16-bit grey to its high byte; blend transparency
with a background colour; resize; crop or pad around the centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted file formats. Pillow reads MPO as JPEG."""
_DRAFTED = ("JPEG", "MPO")
_UNDEFINED_RANGE = ("I", "F")
"""Pillow modes of 32-bit integers and floats, whose value range is undefined."""


CROPS = ("center", "squash", "border")
"""How an image fits a model, named as timm names them; see `InputRule`."""
INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)


@dataclass(frozen=True)
class InputRule:
    """The manifest's `input`.

    crop: what happens before the centre is cropped. center: the image covers resize_height x
        resize_width at its aspect ratio. squash: it is resized to exactly that. border: it fits
        within that at its aspect ratio, and is padded with the mean.
    resize_height, resize_width: pixels are those of timm's `create_transform`.
    resize_shorter_side: in their place, for versions published before there were two sides; sizes
        round half up.
    Units: sides in pixels; mean and std of channel values scaled to 0 … 1
    """

    height: int
    width: int
    resize_shorter_side: int | None = None
    interpolation: str = "bicubic"
    jpeg_draft_scale: int = 2
    alpha_background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: str = "center"
    resize_height: int | None = None
    resize_width: int | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: expected {', '.join(CROPS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}: expected {', '.join(INTERPOLATIONS)}")
        self._check_sides()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} {values}: expected three numbers, of channels scaled to 0 … 1")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: expected numbers above 0")
        if self.crop == "border" and not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ValueError(f"mean {self.mean} is no colour for a border: expected numbers from 0 to 1")

    def _check_sides(self) -> None:
        shorter, height, width = self.resize_shorter_side, self.resize_height, self.resize_width
        if (shorter is None) == (height is None) or (height is None) != (width is None):
            raise ValueError(
                f"resize_height {height}, resize_width {width}, resize_shorter_side {shorter}: expected the first two, "
                "or the last"
            )
        if shorter is not None and self.crop != "center":
            raise ValueError(f"crop {self.crop!r} needs resize_height and resize_width, not resize_shorter_side")
        if shorter is not None and shorter < max(self.height, self.width):
            raise ValueError(f"resize_shorter_side {shorter} is smaller than the crop {self.height}x{self.width}")
        if height is not None and width is not None and (height < self.height or width < self.width):
            raise ValueError(f"resize {height}x{width} is smaller than the crop {self.height}x{self.width}")


def read_pixels(source: Path | BinaryIO, rule: InputRule) -> NDArray[np.uint8]:
    """Decode, orient, resize and crop an image file. Shapes: returns uint8 (height, width, 3).

    Raises: OSError where Pillow cannot read the file; ValueError where the value range of its
        pixels is undefined.
    """
    with Image.open(source, formats=FORMATS) as image:
        full_size = image.size
        # JPEG only: decode at 1/2, 1/4 or 1/8 of the size, but not below the minimum.
        image.draft(None, _draft_size(image.size, rule))
        image.load()
        upright = _upright(image)
        if image.format not in _DRAFTED or rule.resize_shorter_side is not None:
            # TIFF turns while it loads; and a resize_shorter_side follows from the draft, which rounds its sides up.
            full_size = upright.size
        elif _is_turned(image):
            full_size = full_size[::-1]
        return _cropped(_rgb(upright, rule.alpha_background), rule, _resized_size(full_size, rule))


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


def _is_turned(image: Image.Image) -> bool:
    """Tell whether the EXIF orientation swaps width and height."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - as above
        return False


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


def _draft_size(size: tuple[int, int], rule: InputRule) -> tuple[int, int]:
    """Return the least size of a JPEG draft, whether or not its orientation swaps the sides."""
    if rule.resize_shorter_side is not None:
        side = rule.jpeg_draft_scale * rule.resize_shorter_side
        return side, side
    upright, turned = _resized_size(size, rule), _resized_size(size[::-1], rule)
    width, height = max(upright[0], turned[1]), max(upright[1], turned[0])
    return rule.jpeg_draft_scale * width, rule.jpeg_draft_scale * height


def _resized_size(size: tuple[int, int], rule: InputRule) -> tuple[int, int]:
    """Return (width, height) after resizing. Source: timm's `transforms_imagenet_eval`, torchvision's `Resize`."""
    shorter = min(size)
    if rule.resize_height is None or rule.resize_width is None:
        target = rule.resize_shorter_side
        assert target is not None
        return (2 * size[0] * target + shorter) // (2 * shorter), (2 * size[1] * target + shorter) // (2 * shorter)
    target_size = rule.resize_width, rule.resize_height
    if rule.crop == "squash":
        return target_size
    if rule.crop == "center" and rule.resize_width == rule.resize_height:
        return size[0] * rule.resize_width // shorter, size[1] * rule.resize_width // shorter
    ratios = [side / target for side, target in zip(size, target_size, strict=True)]
    ratio = min(ratios) if rule.crop == "center" else max(ratios)
    # A strip keeps one pixel, where timm fails.
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _cropped(image: Image.Image, rule: InputRule, size: tuple[int, int]) -> NDArray[np.uint8]:
    if size != image.size:
        image = image.resize(size, Image.Resampling[rule.interpolation.upper()])
    colour = tuple(round(255 * value) for value in rule.mean) if rule.crop == "border" else 0
    canvas = Image.new("RGB", (rule.width, rule.height), colour)
    canvas.paste(image, (_offset(image.width, rule.width, rule), _offset(image.height, rule.height, rule)))
    return np.array(canvas, dtype=np.uint8)


def _offset(side: int, target: int, rule: InputRule) -> int:
    """Return where the image starts on a canvas of the target side: below 0 where it is cropped."""
    if side < target:
        return (target - side) // 2
    if rule.resize_shorter_side is not None:
        return -((side - target) // 2)
    # Python rounds halves to even, and so does timm's crop.
    return -round((side - target) / 2)
