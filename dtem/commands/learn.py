from typing import Any

import click

from dtem.options import FILE, example
from dtem.training import run_training

EXAMPLES = example(
    "dtem learn --recipe training/recipes/finetune.toml --out runs/finetune",
    "torchrun --nproc-per-node 8 -m dtem learn --recipe training/recipes/deit-small.toml --out runs/deit-small",
)


@click.command("learn", epilog=EXAMPLES)
@click.option("--recipe", type=FILE, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
@click.option("--out", type=FILE, required=True, help="folder of the run; a run found there is resumed")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=200, help="steps between checkpoints")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="data workers per training process")
def command(**options: Any) -> int:
    """Train by a recipe.

    A recipe of kind finetune trains a ViT on a folder of images, one of kind dtem what to merge. Both can run in
    several processes, on one machine or more. Ctrl-C or SIGTERM ends them after the current step, with a checkpoint.
    training/recipes/README.md lists all kinds and their keys.
    """
    return run_training("learn", **options)
