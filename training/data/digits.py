"""The reference task: classify a small handwritten digit on a photograph or a texture.

The sources are part of scikit-learn: 1,797 scans of handwritten digits (8x8, UCI, CC BY 4.0) and
two photographs (CC BY 2.0). Train, validation and test use disjoint scans and disjoint regions of
the photographs. Each image is a pure function of (task, split, index), bit-identical on every
machine: pixels are computed in integers (`RandomWords`, Pillow's fixed-point resampling, affine
coefficients rounded to 2**-16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from training.data.random_words import RandomWords

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LABELS = tuple(str(digit) for digit in range(10))

_SPLIT_SEED = 20_1998
_N_SCANS = {"train": 1297, "validation": 200, "test": 300}
_PHOTO_COLUMNS = {"train": (0, 368), "validation": (368, 488), "test": (488, 640)}
_SCAN_PIXELS = 64
"""Side of an enlarged scan."""
_EDGE_LEVELS = (64, 76, 88, 100)
"""Thresholds of ink: low ones give bold strokes, high ones fine strokes."""
_MAX_CROP_PIXELS = 120


@dataclass(frozen=True)
class Task:
    """The difficulty of the images. The curriculum increases it; evaluation uses `REFERENCE_TASK`."""

    image_pixels: int = 112
    """Side of the image. Unit: pixels."""
    min_digit_pixels: int = 30
    """Smallest height of a digit. Unit: pixels."""
    max_digit_pixels: int = 50
    """Largest height of a digit. Unit: pixels."""
    photo_percent: int = 55
    """Images with a photograph as their background. Unit: percent."""
    texture_percent: int = 35
    """Images with a texture as their background; the rest have a plain one. Unit: percent."""
    max_tilt_degrees: int = 12
    """Largest tilt in either direction. Unit: degrees."""
    max_clutter: int = 4
    """Largest number of strokes around the digit."""
    min_contrast: int = 112
    """Smallest contrast of digit and background. Unit: grey levels of 255."""
    light_on_dark: bool = False
    """Whether all digits are light on dark."""

    def __post_init__(self) -> None:
        if not 8 <= self.min_digit_pixels <= self.max_digit_pixels <= self.image_pixels:
            raise ValueError(
                f"digit sizes {self.min_digit_pixels} … {self.max_digit_pixels} do not fit {self.image_pixels} px"
            )
        if self.photo_percent + self.texture_percent > 100:
            raise ValueError(f"photo_percent {self.photo_percent} + texture_percent {self.texture_percent} > 100")


REFERENCE_TASK = Task()


class Scene(NamedTuple):
    """One image of the task.

    Shapes: image uint8 (S, S, 3); mask bool (S, S), True where ink covers at least half of a pixel
    Units: box (left, top, right, bottom) of the mask in pixels, right and bottom exclusive
    """

    image: NDArray[np.uint8]
    label: int
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class _Sources:
    scans: dict[Split, list[tuple[Image.Image, int]]]
    photos: dict[Split, list[Image.Image]]


@cache
def _sources() -> _Sources:
    digits = load_digits()
    order = RandomWords(_SPLIT_SEED).permutation(len(digits.target))
    scans: dict[Split, list[tuple[Image.Image, int]]] = {}
    first = 0
    for split in SPLITS:
        chosen = order[first : first + _N_SCANS[split]]
        scans[split] = [(_enlarged(digits.images[i]), int(digits.target[i])) for i in chosen]
        first += _N_SCANS[split]
    images = [Image.fromarray(image) for image in load_sample_images().images]
    photos: dict[Split, list[Image.Image]] = {
        split: [image.crop((_PHOTO_COLUMNS[split][0], 0, _PHOTO_COLUMNS[split][1], image.height)) for image in images]
        for split in SPLITS
    }
    return _Sources(scans, photos)


def _enlarged(scan: NDArray[np.float64]) -> Image.Image:
    """Enlarge an 8x8 scan of levels 0 … 16, with a margin of one scan pixel."""
    levels = np.minimum(scan.astype(np.int64) * 16, 255).astype(np.uint8)
    padded = Image.fromarray(np.pad(levels, 1))
    return padded.resize((_SCAN_PIXELS * 10 // 8,) * 2, Image.Resampling.BICUBIC)


def draw(split: Split, index: int, task: Task = REFERENCE_TASK) -> Scene:
    """Draw image `index` of a split. Equal arguments give identical bits, in any order of calls.

    Raises: ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index {index}: expected 0 or more")
    words = RandomWords(_SPLIT_SEED, SPLITS.index(split), index)
    ground = _ground(words, split, task)
    scan, label = words.pick(_sources().scans[split])
    alpha = _placed(words, scan, task)
    strokes = alpha > 0
    canvas = np.asarray(_clutter(words, ground, strokes, task))
    ink = _ink(words, canvas[strokes], task)
    weight = alpha[..., None].astype(np.int32)
    image = (canvas.astype(np.int32) * (255 - weight) + ink * weight + 127) // 255
    mask = alpha >= 128
    return Scene(image.astype(np.uint8), label, mask, _box(mask))


def patch_ink(mask: NDArray[np.bool_], patch_pixels: int) -> NDArray[np.int64]:
    """Count the digit's pixels in each patch, row by row. Shapes: mask (S, S) -> (patches,)"""
    cells = len(mask) // patch_pixels
    ink: NDArray[np.int64] = mask.reshape(cells, patch_pixels, cells, patch_pixels).sum((1, 3)).ravel()
    return ink


def digit_patches(mask: NDArray[np.bool_], patch_pixels: int) -> NDArray[np.bool_]:
    """Return which patches belong to the digit: at least an eighth is ink.

    Shapes: mask (S, S) -> (patches,)
    """
    return patch_ink(mask, patch_pixels) * 8 >= patch_pixels**2


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --- the digit ---


def _placed(words: RandomWords, scan: Image.Image, task: Task) -> NDArray[np.uint8]:
    """Draw a scan with random stroke width, size, slant, tilt and position.

    Shapes: returns uint8 alpha (S, S)
    """
    edge = words.pick(_EDGE_LEVELS)
    glyph = scan.point([min(255, max(0, (level - edge) * 3)) for level in range(256)])
    size = words.integer(task.min_digit_pixels, task.max_digit_pixels)
    stretch = words.integer(-15, 15) / 100
    slant = words.integer(-20, 20) / 100
    tilt = math.radians(words.integer(-100, 100) * task.max_tilt_degrees / 100)
    width, height = size * (1 - stretch / 2), size * (1 + stretch / 2)
    # Half the size, plus room for tilt, stretch and slant.
    margin = size * 5 // 8
    centre_x, centre_y = (words.integer(margin * 64, (task.image_pixels - margin) * 64) / 64 for _ in range(2))
    # Pillow maps output to input pixels: rotate about the centre, slant, then scale to the scan.
    cosine, sine = math.cos(tilt), math.sin(tilt)
    x_scale, y_scale = _SCAN_PIXELS / width, _SCAN_PIXELS / height
    middle = scan.width / 2
    a, b = (cosine - slant * sine) * x_scale, (sine + slant * cosine) * x_scale
    d, e = -sine * y_scale, cosine * y_scale
    matrix = (a, b, middle - a * centre_x - b * centre_y, d, e, middle - d * centre_x - e * centre_y)
    # libm may differ in the last bit between machines, so round to 2**-16 of a pixel.
    rounded = tuple(round(value * 65536) / 65536 for value in matrix)
    side = (task.image_pixels, task.image_pixels)
    return np.asarray(glyph.transform(side, Image.Transform.AFFINE, rounded, Image.Resampling.BILINEAR))


def _ink(words: RandomWords, under: NDArray[np.uint8], task: Task) -> NDArray[np.int32]:
    """Choose a colour `min_contrast` grey levels or more from the mean under the digit."""
    if task.light_on_dark:
        return np.array([words.integer(200, 255)] * 3, np.int32)
    red, green, blue = (int(channel) for channel in under.astype(np.int64).sum(0))
    ground_luma = (299 * red + 587 * green + 114 * blue) // (1000 * len(under))
    while True:
        colour = words.bytes(3).astype(np.int32)
        luma = int(299 * colour[0] + 587 * colour[1] + 114 * colour[2]) // 1000
        if abs(luma - ground_luma) >= task.min_contrast:
            return colour


# --- the background ---


def _ground(words: RandomWords, split: Split, task: Task) -> Image.Image:
    choice = words.integer(0, 99)
    if choice < task.photo_percent:
        return _photo(words, split, task.image_pixels)
    if choice < task.photo_percent + task.texture_percent:
        return _texture(words, task.image_pixels)
    top = 64 if task.light_on_dark else 255
    level = words.integer(0, top)
    colour = (level,) * 3 if task.light_on_dark else tuple(int(c) for c in words.bytes(3))
    return Image.new("RGB", (task.image_pixels,) * 2, colour)


def _photo(words: RandomWords, split: Split, side: int) -> Image.Image:
    """Crop a photograph within the split's columns, rotate it, and mix its colours."""
    photo = words.pick(_sources().photos[split])
    crop = words.integer(48, _MAX_CROP_PIXELS)
    left, top = words.integer(0, photo.width - crop), words.integer(0, photo.height - crop)
    resized = photo.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    pixels = np.rot90(np.asarray(resized), words.integer(0, 3))
    if words.chance(50):
        pixels = pixels[:, ::-1]
    channels = words.permutation(3) if words.chance(50) else np.arange(3)
    gain, offset = words.integer(160, 300), words.integer(-40, 40)
    toned = pixels[..., channels].astype(np.int32) * gain // 256 + offset
    return Image.fromarray(np.clip(toned, 0, 255).astype(np.uint8))


def _texture(words: RandomWords, side: int) -> Image.Image:
    return words.pick((_noise, _stripes, _checks))(words, side)


def _noise(words: RandomWords, side: int) -> Image.Image:
    """Blend coarse and fine noise, each an enlarged grid of random colours."""
    coarse, fine = (
        np.asarray(
            Image.fromarray(words.bytes(cells, cells, 3)).resize((side, side), Image.Resampling.BICUBIC), np.int32
        )
        for cells in (words.integer(2, 6), words.integer(8, 28))
    )
    share = words.integer(0, 160)
    return Image.fromarray(((coarse * (256 - share) + fine * share) // 256).astype(np.uint8))


def _phase(words: RandomWords, side: int) -> NDArray[np.int64]:
    """Return a plane wave in integers. Units: 1/256 of a period. Shapes: returns (side, side)"""
    y, x = np.mgrid[0:side, 0:side]
    wave: NDArray[np.int64] = x * words.integer(-28, 28) + y * words.integer(-28, 28) + words.integer(0, 255)
    return wave


def _two_colours(words: RandomWords, share: NDArray[np.int64]) -> Image.Image:
    """Mix two random colours. Shapes: share (side, side), from 0 to 256 of the second"""
    first, second = words.bytes(2, 3).astype(np.int64)
    mixed = (first * (256 - share[..., None]) + second * share[..., None]) // 256
    return Image.fromarray(mixed.astype(np.uint8))


def _stripes(words: RandomWords, side: int) -> Image.Image:
    """Draw stripes with a triangular profile."""
    return _two_colours(words, np.abs((_phase(words, side) % 256) - 128) * 2)


def _checks(words: RandomWords, side: int) -> Image.Image:
    return _two_colours(words, ((_phase(words, side) >> 7 ^ _phase(words, side) >> 7) & 1) * 256)


def _clutter(words: RandomWords, ground: Image.Image, keep_clear: NDArray[np.bool_], task: Task) -> Image.Image:
    """Draw a few small coloured strokes and shapes outside the digit."""
    pen = ImageDraw.Draw(ground)
    rows, columns = np.flatnonzero(keep_clear.any(1)), np.flatnonzero(keep_clear.any(0))
    for _ in range(words.integer(0, task.max_clutter)):
        length = words.integer(task.min_digit_pixels // 3, task.max_digit_pixels // 2)
        x, y = (words.integer(0, task.image_pixels - 1) for _ in range(2))
        end_x, end_y = x + words.integer(-length, length), y + words.integer(-length, length)
        left, right, top, bottom = min(x, end_x), max(x, end_x), min(y, end_y), max(y, end_y)
        colour = tuple(int(c) for c in words.bytes(3))
        shape, width = words.integer(0, 2), words.integer(2, 5)
        overlaps = left - 6 <= columns[-1] and right + 6 >= columns[0] and top - 6 <= rows[-1] and bottom + 6 >= rows[0]
        if overlaps:
            continue
        if shape == 0:
            pen.line((x, y, end_x, end_y), fill=colour, width=width)
        elif shape == 1:
            pen.ellipse((left, top, right, bottom), fill=colour)
        else:
            pen.rectangle((left, top, right, bottom), fill=colour)
    return ground
