"""Train by a recipe, in one process or several."""

from __future__ import annotations

import sys
from argparse import Namespace

import torch

from training.data.preprocessing import InputRule
from training.data.sources import find_dataset
from training.learn.backbone import BackboneTraining
from training.learn.dtem import DtemTraining
from training.learn.images import training_images, validation_images
from training.learn.processes import started_processes, stop_signals
from training.learn.recipe import DtemRecipe, read_recipe
from training.models.classifier import input_rule
from training.models.vit import load_vit


def run(options: Namespace) -> int:
    """Return 0, or 130 where the run was stopped after a checkpoint."""
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
            print(f"stopped after step {training.n_steps_taken}; run the same command to resume", file=sys.stderr)
        return 130


def _input_rule(recipe: DtemRecipe) -> InputRule:
    def model_rule() -> InputRule:
        with torch.device("meta"):  # shapes without memory
            return input_rule(load_vit(recipe.architecture, **recipe.arguments))

    return find_dataset(recipe.data.source).rule(model_rule)
