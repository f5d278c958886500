"""Test images of the reference task as JPEGs, with their labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.sources import DigitScenes

QUALITY = 95


@dataclass(frozen=True)
class LabelledJpeg:
    data: bytes
    label: int


def draw_jpegs(n_images: int) -> list[LabelledJpeg]:
    """Return the first test images of the reference task."""
    scenes = DigitScenes("test", n_images)
    return [LabelledJpeg(encode(pixels.numpy()), label) for pixels, label in (scenes[i] for i in range(n_images))]


def encode(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_jpegs(folder: Path, jpegs: Sequence[LabelledJpeg]) -> list[Path]:
    """Write one file per image, for clients that read files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{place:05}-is-{jpeg.label}.jpg" for place, jpeg in enumerate(jpegs)]
    for file, jpeg in zip(files, jpegs, strict=True):
        file.write_bytes(jpeg.data)
    return files
