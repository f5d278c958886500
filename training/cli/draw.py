"""Draw images of the reference task: files to view or to classify, and a contact sheet.

The examples in the repository, JPEG and PNG alternating:
  python -m training.cli.draw --count 12 --out examples
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from training.cli.command import run_command
from training.data.digits import SPLITS, Scene, draw

_SHEET_COLUMNS = 10


def main(arguments: list[str] | None = None) -> int:
    return run_command("drawing", __doc__, _add_options, _draw, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    parser.add_argument("--count", type=int, default=12, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for <split>-<index>-is-<digit>.jpg and .png")
    parser.add_argument("--sheet", type=Path, help="PNG file for a contact sheet of all images")


def _draw(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = {index: draw(options.split, index) for index in range(options.first, options.first + options.count)}
    for index, scene in scenes.items():
        suffix = "png" if index % 2 else "jpg"
        file = options.out / f"{options.split}-{index:05d}-is-{scene.label}.{suffix}"
        Image.fromarray(scene.image).save(file, quality=92)
    if options.sheet:
        _sheet(list(scenes.values())).save(options.sheet)


def _sheet(scenes: list[Scene]) -> Image.Image:
    blank = np.zeros_like(scenes[0].image)
    tiles = [scene.image for scene in scenes] + [blank] * (-len(scenes) % _SHEET_COLUMNS)
    rows = [np.concatenate(tiles[i : i + _SHEET_COLUMNS], 1) for i in range(0, len(tiles), _SHEET_COLUMNS)]
    return Image.fromarray(np.concatenate(rows, 0))


if __name__ == "__main__":
    sys.exit(main())
