from typing import Any

import click

from dtem.options import FILE, example
from dtem.training import run_training

EXAMPLES = example(
    "dtem compare docs/results/policies.json --out docs/results/dtem-tome",
    "dtem compare runs/a/policies.json runs/b/policies.json --base none --other dtem --out runs/b/comparison",
)


@click.command("compare", epilog=EXAMPLES)
@click.argument("evaluation", type=FILE)
@click.argument("another", type=FILE, required=False)
@click.option(
    "--base",
    default="tome",
    help="a policy (compared at equal r), or one row (none, tome-r8, …) to compare all others with",
)
@click.option("--other", default="dtem", help="comma-separated policies or rows, e.g. dtem,random or dtem-r8")
@click.option("--out", type=FILE, required=True, help="writes <out>.json, <out>.md and <out>.png")
def command(**options: Any) -> int:
    """Compare evaluations image by image.

    Writes a table, a JSON file and a plot of the differences. EVALUATION is a JSON file of `dtem evaluate` with
    the base; ANOTHER has the other rows, by default the same file.
    """
    return run_training("compare", **options)
