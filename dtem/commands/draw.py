from typing import Any

import click

from dtem.options import FILE, example
from dtem.training import run_training


@click.command("draw", epilog=example("dtem draw --count 12 --out examples"))
@click.option("--split", default="test", help="train, validation or test")
@click.option("--first", type=click.IntRange(min=0), default=0, help="index of the first image")
@click.option("--count", type=click.IntRange(min=1), default=12, help="number of images")
@click.option("--out", type=FILE, required=True, help="folder for <split>-<index>-is-<digit>.jpg and .png")
@click.option("--sheet", type=FILE, help="PNG file for a contact sheet of all images")
def command(**options: Any) -> int:
    """Draw images of the reference task, to view or to classify."""
    return run_training("draw", **options)
