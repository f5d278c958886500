"""Train by a recipe.

  python -m training.cli.learn --recipe training/recipes/reference.toml --out runs/reference

A recipe of DTEM can also run in several processes, on one machine or more:
  torchrun --nproc-per-node 8 -m training.cli.learn --recipe training/recipes/deit-small.toml --out runs/deit-small

A run found in --out is resumed. Ctrl-C or SIGTERM ends a run of DTEM after its current step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from training.cli.command import INTERRUPTED, SUCCESS, run_command
from training.data.preprocessing import InputRule
from training.data.sources import find_dataset
from training.learn.backbone import BackboneTraining
from training.learn.dtem import DtemTraining
from training.learn.images import training_images, validation_images
from training.learn.processes import started_processes, stop_signals
from training.learn.recipe import DtemRecipe, read_recipe
from training.models.classifier import input_rule
from training.models.vit import load_vit


def main(arguments: list[str] | None = None) -> int:
    return run_command("training", __doc__, _add_options, _learn, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there is resumed")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints, for DTEM")
    parser.add_argument("--workers", type=int, default=2, help="data workers per training process")


def _learn(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe)
    if not isinstance(recipe, DtemRecipe):
        BackboneTraining(recipe, options.out, n_workers=options.workers).run()
        return SUCCESS
    rule = _input_rule(recipe)
    with started_processes() as processes:
        images = training_images(recipe.data, rule, recipe.seed)
        validation = validation_images(recipe.data, rule, images.classes, n_workers=options.workers)
        training = DtemTraining(
            recipe, images, options.out, validation=validation, processes=processes, n_workers=options.workers
        )
        with stop_signals() as stop:
            if training.run(checkpoint_every=options.checkpoint_every, stop=stop):
                return SUCCESS
        if processes.is_first:
            print(f"stopped after step {training.n_steps_taken}; run the same command to resume", file=sys.stderr)
        return INTERRUPTED


def _input_rule(recipe: DtemRecipe) -> InputRule:
    def model_rule() -> InputRule:
        with torch.device("meta"):  # shapes without memory
            return input_rule(load_vit(recipe.architecture, **recipe.arguments))

    return find_dataset(recipe.data.source).rule(model_rule)


if __name__ == "__main__":
    sys.exit(main())
