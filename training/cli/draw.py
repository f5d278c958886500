"""Draw images of the reference task: files to view or to classify, and a contact sheet."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
from PIL import Image

from training.cli.model_options import chosen_split
from training.data.digits import Scene, draw

_SHEET_COLUMNS = 10


def run(options: Namespace) -> int:
    split = chosen_split(options.split)
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = {index: draw(split, index) for index in range(options.first, options.first + options.count)}
    for index, scene in scenes.items():
        suffix = "png" if index % 2 else "jpg"
        file = options.out / f"{split}-{index:05d}-is-{scene.label}.{suffix}"
        Image.fromarray(scene.image).save(file, quality=92)
    if options.sheet:
        _sheet(list(scenes.values())).save(options.sheet)
    return 0


def _sheet(scenes: list[Scene]) -> Image.Image:
    blank = np.zeros_like(scenes[0].image)
    tiles = [scene.image for scene in scenes] + [blank] * (-len(scenes) % _SHEET_COLUMNS)
    rows = [np.concatenate(tiles[i : i + _SHEET_COLUMNS], 1) for i in range(0, len(tiles), _SHEET_COLUMNS)]
    return Image.fromarray(np.concatenate(rows, 0))
