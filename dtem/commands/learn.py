from typing import Any

import click

from dtem.options import FILE, example
from dtem.training import run_training

EXAMPLES = example(
    "dtem learn --recipe training/recipes/reference.toml --out runs/reference",
    "torchrun --nproc-per-node 8 -m dtem learn --recipe training/recipes/deit-small.toml --out runs/deit-small",
)


@click.command("learn", epilog=EXAMPLES)
@click.option("--recipe", type=FILE, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
@click.option("--out", type=FILE, required=True, help="folder of the run; a run found there is resumed")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=200, help="steps between checkpoints, for DTEM")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="data workers per training process")
def command(**options: Any) -> int:
    """Train by a recipe.

    A recipe of DTEM can also run in several processes, on one machine or more. Ctrl-C or SIGTERM ends a run of
    DTEM after its current step, with a checkpoint.
    """
    return run_training("learn", **options)
