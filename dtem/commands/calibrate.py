from typing import Any

import click

from dtem.options import FILE, example, model_options
from dtem.training import run_training

EXAMPLES = example(
    "dtem calibrate --published model_store/reference/5 --max-accuracy-drop 0.0 --out runs/atm",
    "dtem calibrate --architecture deit_small_patch16_224 --weights pretrained --data imagenet/val --out runs/deit-atm",
)


@click.command("calibrate", epilog=EXAMPLES)
@model_options(split="validation", n_images_help="of the search; default: 2000, or half of a smaller folder")
@click.option(
    "--n-unseen",
    type=click.IntRange(min=1),
    help="images for the report, unseen by the search; default: 2000, or the rest of a smaller folder",
)
@click.option("--unlabelled", is_flag=True, help="ignore labels; count a changed prediction as lost")
@click.option("--max-accuracy-drop", type=float, default=0.0, help="points of top-1")
@click.option("--metric", default="features", help="what tokens are compared by: features, keys, or embedding (DTEM)")
@click.option("--score", default="similarity", help="score compared with the thresholds: similarity or importance")
@click.option(
    "--split-depth",
    type=int,
    help="number of blocks that split tokens alternately, before the others split them by size; default: searched",
)
@click.option("--n-trials", type=int, default=160, help="thresholds to try")
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu", help="a PyTorch device, e.g. cuda")
@click.option("--out", type=FILE, help="default: runs/calibrations/<metric>-<drop>")
def command(**options: Any) -> int:
    """Find thresholds of adaptive merging within a bound on lost accuracy.

    The result has the fewest GMACs of those tried. The default model is the latest version of the reference
    model. Writes <out>.json, the calibration, for --calibrations of evaluate and export; <out>.trials.jsonl,
    from which an interrupted search resumes; and <out>.png. The same command writes the same file.
    """
    return run_training("calibrate", **options)
