"""Make a checkpoint and two folders of images, to try docs/own-model.md on.

  .venv/bin/python examples/own_model.py own

Writes own/model.pth, the reference model reduced to the digits 0 to 4, in the form that training scripts save: nested
under "model", every name with the prefix "module.". And own/train and own/val, with one folder of JPEG files per class.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from training.data.digits import Split, draw

WEIGHTS = Path(__file__).parents[1] / "model_store/reference/5/weights.safetensors"
# Outputs in the order of the folders' names, as training on such folders has them.
DIGITS = {"four": 4, "one": 1, "three": 3, "two": 2, "zero": 0}
# Images drawn per class, of the split that each folder takes them from.
FOLDERS: dict[str, tuple[Split, int]] = {"train": ("train", 200), "val": ("validation", 60)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "model.pth")
    for name, (split, n_images) in FOLDERS.items():
        draw_images(folder / name, split, n_images)
    print(f"wrote {folder}: model.pth, train and val")
    return 0


def save_checkpoint(path: Path) -> None:
    weights = {name: tensor for name, tensor in load_file(WEIGHTS).items() if not name.endswith("_embedding")}
    weights |= {name: weights[name][list(DIGITS.values())] for name in ("head.weight", "head.bias")}
    torch.save({"epoch": 20, "model": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)


def draw_images(folder: Path, split: Split, n_images: int) -> None:
    """Draw the first n_images of each class."""
    names = {digit: name for name, digit in DIGITS.items()}
    missing = dict.fromkeys(names, n_images)
    index = 0
    while any(missing.values()):
        scene = draw(split, index)
        if missing.get(scene.label):
            missing[scene.label] -= 1
            path = folder / names[scene.label] / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(path, quality=95)
        index += 1


if __name__ == "__main__":
    sys.exit(main())
