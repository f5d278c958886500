from typing import Any

import click

from dtem.options import FILE, example, model_options, rates_option
from dtem.training import run_training

EXAMPLES = example(
    "dtem evaluate --published model_store/reference/5 --out docs/results/policies",
    "dtem evaluate --run runs/reference-dtem --rates 8,16 --out runs/reference-dtem/policies",
    "dtem evaluate --architecture deit_small_patch16_224 --weights pretrained --data imagenet/val --out runs/deit-s",
)


@click.command("evaluate", epilog=EXAMPLES)
@model_options()
@rates_option()
@click.option("--policies", help="comma-separated, of none, tome, dtem, random; default: those that the model supports")
@click.option("--measured", is_flag=True, help="start from what the export of --published measured")
@click.option("--calibrations", help="comma-separated files of dtem calibrate")
@click.option("--batch-size", type=click.IntRange(min=1), help="default: 50, or fewer where the model is large")
@click.option("--device", default="cpu", help="a PyTorch device, e.g. cuda")
@click.option("--out", type=FILE, required=True, help="writes <out>.json, <out>.npz, <out>.md and <out>.png")
def command(**options: Any) -> int:
    """Measure accuracy and GMACs of policies over rates.

    Writes a table, a JSON file and a plot. Rows already in <out>.json are kept, so an interrupted evaluation
    resumes. --calibrations adds rows of adaptive policies. --published with --measured reports what the export
    measured on the graphs; with --policies or --calibrations it also measures, in PyTorch on the same images,
    the rows that are missing. <out>.npz records the scores of each row, image by image, for `dtem compare`.
    """
    return run_training("evaluate", **options)
