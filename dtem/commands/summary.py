from typing import Any

import click

from dtem.options import FILE, example
from dtem.training import run_training


@click.command("summary", epilog=example("dtem summary model_store/reference/5 --out runs/reference"))
@click.argument("version", type=FILE)
@click.option("--out", type=FILE, help="also write <out>.md and <out>.png")
def command(**options: Any) -> int:
    """Show the variants of a published version.

    A table of GMACs, accuracy with its interval and ms on this machine, a picture, and how to serve the version.
    """
    return run_training("summary", **options)
