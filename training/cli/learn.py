"""Train by a recipe: `python -m training.cli.learn --recipe training/recipes/reference.toml --out runs/reference`.

A recipe of DTEM also runs in several processes, on one machine or more:
`torchrun --nproc-per-node 8 -m training.cli.learn --recipe training/recipes/deit-small.toml --out runs/deit-small`
A run found in --out is resumed. Ctrl-C and SIGTERM end a run of DTEM after its step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from training.data.preprocessing import InputRule
from training.data.sources import REFERENCE_INPUT
from training.learn.backbone import BackboneTraining
from training.learn.dtem import DtemTraining
from training.learn.images import training_images, validation_images
from training.learn.processes import started_processes, stop_signals
from training.learn.recipe import DtemRecipe, read_recipe
from training.models.classifier import input_rule
from training.models.vit import load_vit

STOPPED = 130


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 trained, 2 refused, with the reason on standard error, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there is resumed")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="in steps, for recipes of DTEM")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw images, for each that trains")
    options = parser.parse_args(arguments)
    try:
        return _learn(options)
    except (ValueError, OSError) as err:
        print(f"training refused: {err}", file=sys.stderr)
        return 2


def _learn(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe)
    if not isinstance(recipe, DtemRecipe):
        BackboneTraining(recipe, options.out, n_workers=options.workers).run()
        return 0
    rule = _input_rule(recipe)
    with started_processes() as processes:
        images = training_images(recipe.data, rule, recipe.seed)
        validation = validation_images(recipe.data, rule, images.classes, n_workers=options.workers)
        training = DtemTraining(
            recipe, images, options.out, validation=validation, processes=processes, n_workers=options.workers
        )
        with stop_signals() as stop:
            if training.run(checkpoint_every=options.checkpoint_every, stop=stop):
                return 0
        if processes.is_first:
            print(f"stopped after step {training.n_steps_taken}; the same command goes on from there", file=sys.stderr)
        return STOPPED


def _input_rule(recipe: DtemRecipe) -> InputRule:
    if recipe.data.source == "digits":
        return REFERENCE_INPUT
    with torch.device("meta"):  # its shape alone
        return input_rule(load_vit(recipe.architecture, **recipe.arguments))


if __name__ == "__main__":
    sys.exit(main())
