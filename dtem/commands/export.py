from pathlib import Path
from typing import Any

import click

from dtem.options import FILE, example, model_options, rates_option
from dtem.training import run_training
from training.cli.plan import check

EXAMPLES = example(
    "dtem export --run runs/reference --name reference",
    "dtem export --architecture deit_small_patch16_224 --weights pretrained --data imagenet/val --name deit-s",
)


@click.command("export", epilog=EXAMPLES)
@model_options()
@click.option("--name", required=True, help="name of the model, in the store and in requests")
@click.option("--version", help="a whole number; default: the next one")
@click.option("--store", type=FILE, default=Path("model_store"))
@rates_option()
@click.option("--default-r", type=int, help="rate of requests that choose none; default: the nearest to 8 above 0")
@click.option("--default-policy", help="default: dtem where there is an embedding, else tome")
@click.option("--calibrations", help="comma-separated files of dtem calibrate")
@click.option("--formats", default="onnx", help="comma-separated, of onnx, torchscript")
@click.option("--precisions", default="float32", help="comma-separated, of float32")
@click.option("--tolerance", type=float, default=1e-4, help="largest difference of a result from eager")
@click.option("--device", default="cpu", help="on which the graphs are measured, e.g. cuda")
def command(**options: Any) -> int:
    """Publish a ViT: a verified, measured graph per policy and rate.

    With an embedding, policy dtem is exported in addition to tome and none; with calibrations, the adaptive
    policies atm and adaptive-dtem. An interrupted export resumes. A published version never changes.
    """
    return run_training("export", check=check, **options)
