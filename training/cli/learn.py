"""Train by a recipe: `python -m training.cli.learn --recipe training/recipes/reference.toml --out runs/reference`.

A recipe of DTEM also runs in several processes, on one machine or more:
`torchrun --nproc-per-node 8 -m training.cli.learn --recipe training/recipes/deit-small.toml --out runs/deit-small`
A run found in --out is resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.learn.backbone import MEAN, STD, BackboneTraining
from training.learn.dtem import DtemTraining
from training.learn.images import DigitImages, TrainingImages
from training.learn.processes import started_processes
from training.learn.recipe import DtemRecipe, read_recipe


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 trained, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there is resumed")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw images, for each that trains")
    options = parser.parse_args(arguments)
    try:
        _learn(options)
    except (ValueError, OSError) as err:
        print(f"training refused: {err}", file=sys.stderr)
        return 2
    return 0


def _learn(options: argparse.Namespace) -> None:
    recipe = read_recipe(options.recipe)
    if not isinstance(recipe, DtemRecipe):
        BackboneTraining(recipe, options.out, n_workers=options.workers).run()
        return
    with started_processes() as processes:
        images = _images(recipe)
        DtemTraining(recipe, images, options.out, processes=processes, n_workers=options.workers).run()


def _images(recipe: DtemRecipe) -> TrainingImages:
    return DigitImages(recipe.data.n_distinct or 0, MEAN, STD)


if __name__ == "__main__":
    sys.exit(main())
