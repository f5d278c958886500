from typing import Any

import click

from dtem.options import FILE, example, model_options
from dtem.training import run_training

EXAMPLES = example(
    "dtem inspect --weights mine.pth --data val",
    "dtem inspect --weights mine.pth --data val --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --out runs/mine",
)


@click.command("inspect", epilog=EXAMPLES)
@model_options(n_images=500)
@click.option("--device", default="cpu", help="a PyTorch device, e.g. cuda")
@click.option("--out", type=FILE, help="write the model as a run, which the other commands take as --run")
@click.option("--train", type=FILE, help="with --out: images to learn from, for a recipe of DTEM, <out>/dtem.toml")
@click.option("--n-learn", type=click.IntRange(min=64), default=8192, help="images of that recipe, repeats included")
def command(**options: Any) -> int:
    """Say what a model is, and how accurate it is unmerged.

    Architecture, classes, pixels, and the accuracy on some images: the check that the weights, the labels and the
    pixels belong together, before anything is made of them.
    """
    return run_training("inspect", **options)
