"""From a recipe to its training: the images, their preprocessing, and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training.data.preprocessing import InputRule
from training.data.sources import find_dataset
from training.learn.dtem import DtemTraining
from training.learn.finetune import FinetuneTraining, as_stated
from training.learn.image_training import ImageTraining
from training.learn.images import training_images, validation_images
from training.learn.processes import Processes
from training.learn.recipe import DtemRecipe, FinetuneRecipe
from training.models.classifier import input_rule
from training.models.vit import load_vit


def prepared(
    recipe: DtemRecipe | FinetuneRecipe, folder: Path, *, processes: Processes, n_workers: int
) -> ImageTraining[Any]:
    """Open the images of a recipe and build its model. Raises: ValueError or OSError, as these do."""
    if isinstance(recipe, FinetuneRecipe):
        recipe = as_stated(recipe)
    rule = recipe_rule(recipe)
    images = training_images(recipe.data, rule, recipe.seed)
    validation = validation_images(recipe.data, rule, images.classes, n_workers=n_workers)
    kinds: dict[type, type[ImageTraining[Any]]] = {DtemRecipe: DtemTraining, FinetuneRecipe: FinetuneTraining}
    return kinds[type(recipe)](recipe, images, folder, validation=validation, processes=processes, n_workers=n_workers)


def recipe_rule(recipe: DtemRecipe | FinetuneRecipe) -> InputRule:
    """Return the preprocessing: that of the dataset, or the one timm states for the architecture."""

    def model_rule() -> InputRule:
        with torch.device("meta"):  # shapes without memory
            return input_rule(load_vit(recipe.architecture, **recipe.arguments))

    return find_dataset(recipe.data.source).rule(model_rule)
