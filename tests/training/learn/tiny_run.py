"""A small run of DTEM for tests: a ViT of 17 tokens, a folder of four classes, a TOML recipe."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from training.data.preprocessing import InputRule
from training.data.random_words import RandomWords
from training.learn.dtem import DtemTraining
from training.learn.images import training_images, validation_images
from training.learn.processes import Processes
from training.learn.recipe import DtemRecipe, read_recipe
from training.models.vit import load_vit

RULE = InputRule(height=64, width=64, resize_shorter_side=71, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ARGUMENTS: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}

_RECIPE = """
kind = "dtem"
mode = "modular"
seed = 5
r = 3
dim = 8
n_images = 320
batch_size = 8

[model]
architecture = "vit_tiny_patch16_224"
arguments = {{ img_size = 64, embed_dim = 32, depth = 3, num_heads = 2, num_classes = 4 }}
weights = "{folder}/vit.safetensors"

[data]
source = "{folder}/train"
validation = "{folder}/val"
n_validation = 8
randaugment = "rand-m9-mstd0.5-inc1"
erasing = 0.25
mixup = 0.8
cutmix = 1.0

[embedding]
learning_rate = [1e-3, 1e-5]
weight_decay = 1e-4
clip_norm = 5.0
"""
FINETUNE = """
kind = "finetune"
seed = 5
epochs = 3
batch_size = 12
micro_batch = 8

[model]
architecture = "vit_tiny_patch16_224"
arguments = {{ img_size = 64, embed_dim = 32, depth = 3, num_heads = 2 }}
weights = "{folder}/vit.safetensors"
drop_path = 0.2

[data]
source = "{folder}/train"
validation = "{folder}/val"
min_crop = 0.5
flip = 0.0
mixup = 0.2
label_smoothing = 0.1

[optimiser]
learning_rate = [3e-3, 1e-5]
weight_decay = 0.05
clip_norm = 1.0
layer_decay = 0.8
"""
VIT = """
[vit]
learning_rate = [1e-4, 1e-5]
weight_decay = 0.05
clip_norm = 1.0
"""


def write_vit(file: Path, **changes: Any) -> Path:
    """Save a seeded ViT whose logits differ between images (timm initialises near zero)."""
    torch.manual_seed(11)
    vit = load_vit("vit_tiny_patch16_224", **{**ARGUMENTS, **changes})
    for parameter in vit.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    save_file(vit.state_dict(), file)
    return file


def write_images(root: Path, n_images: int, classes: tuple[str, ...] = ("ant", "bee", "cat", "dog")) -> Path:
    """Write noise, brighter in another channel for each class, as `<root>/<class>/<number>.png`."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(n_images):
            pixels = RandomWords(3, label, number).bytes(80, 90, 3) // 3
            pixels[..., label % 3] += 40 * (1 + label // 3)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def write_run(folder: Path, text: str = _RECIPE, **replaced: str) -> Path:
    """Write ViT, images and recipe.toml, with lines replaced by key: `r="r = 12"`."""
    write_vit(folder / "vit.safetensors")
    write_images(folder / "train", 10)
    write_images(folder / "val", 2)
    lines = text.format(folder=folder).splitlines()
    for key, line in replaced.items():
        (place,) = (index for index, old in enumerate(lines) if old.startswith(f"{key} ="))
        lines[place] = line
    file = folder / "recipe.toml"
    file.write_text("\n".join(lines))
    return file


def tiny_recipe(file: Path) -> DtemRecipe:
    recipe = read_recipe(file)
    assert isinstance(recipe, DtemRecipe)
    return recipe


def tiny_training(recipe: DtemRecipe, out: Path, *, n_workers: int = 0) -> DtemTraining:
    images = training_images(recipe.data, RULE, recipe.seed)
    validation = validation_images(recipe.data, RULE, images.classes)
    return DtemTraining(recipe, images, out, validation=validation, processes=Processes(), n_workers=n_workers)


def logged(out: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without their time."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]
