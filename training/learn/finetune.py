"""Fine-tune a ViT on images of other classes, or train it on them from scratch.

The head is new, whatever the weights had: its initial value is 0, as in arXiv 2010.11929. Without
merging: what it learns is a plain ViT, which any policy can be added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.data.training_images import TrainingImages
from training.learn.image_training import ImageTraining
from training.learn.images import Validation
from training.learn.parameter_groups import layerwise_groups
from training.learn.processes import Processes
from training.learn.recipe import FinetuneRecipe, LayerwiseAdamW
from training.models.checkpoints import Checkpoint, open_checkpoint
from training.models.vit import MergingVisionTransformer, load_vit
from training.models.weights import save_weights

_VIT = "vit"
_PIXELS = "pretrained_cfg_overlay"
"""timm's argument for what the weights were trained with: mean, std, crop_pct, ..."""


class FinetuneTraining(ImageTraining[FinetuneRecipe]):
    """A run that trains a ViT; weights.safetensors are the best by validation, or else the last.

    Of equally good weights the later ones are kept. They are validated after each epoch.
    recipe: as `as_stated` returns it. notes: about the weights, for the user.
    Raises: ValueError where the arguments name another number of classes than the images have, or
        the run is shorter than one batch.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        images: TrainingImages,
        folder: Path,
        *,
        validation: Validation | None = None,
        processes: Processes,
        n_workers: int,
    ) -> None:
        recipe = _with_classes(recipe, images.classes)
        super().__init__(recipe, images, folder, validation=validation, processes=processes, n_workers=n_workers)
        vit, self.notes = _initial_vit(recipe)
        self.vit = vit.to(processes.device)
        self.learners[_VIT] = self.vit
        groups = layerwise_groups(self.vit, recipe.optimiser.weight_decay, recipe.optimiser.layer_decay)
        self.optimisers[_VIT] = torch.optim.AdamW(groups, betas=recipe.optimiser.betas, fused=True)
        # On CPUs the backward pass of fused attention is slower than separate matrix products.
        self._merging = partial(
            MergingVisionTransformer, schedule=0, attention="plain" if processes.device.type == "cpu" else "masked"
        )
        self.model = self._merging(self.vit)
        self.average: Any = None
        if recipe.ema is not None:
            self.average = AveragedModel(self.vit, multi_avg_fn=partial(_average, recipe.ema)).requires_grad_(False)
        self.best_top1, self._is_new_best = -1.0, False

    @property
    def written(self) -> nn.Module:
        """The ViT that is validated and written: the average of its weights, if there is one."""
        return cast(nn.Module, self.vit if self.average is None else self.average.module)

    @property
    def validated(self) -> MergingVisionTransformer:
        return self._merging(self.written)

    def learner_of_step(self, step: int) -> str:
        return _VIT

    def settings_of(self, learner: str) -> LayerwiseAdamW:
        return self.recipe.optimiser

    def model_of(self, learner: str) -> nn.Module:
        return self.model

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        figures = super().step(images, labels)
        if self.average is not None:
            self.average.update_parameters(self.vit)
        return figures

    def is_validation_due(self, checkpoint_every: int) -> bool:
        """Return whether the step that was just taken ended an epoch."""
        n_images = len(self.images)
        return self.n_seen // n_images > (self.n_seen - self.recipe.batch_size) // n_images

    def validate(self, validation: Validation) -> float:
        top1 = super().validate(validation)
        if top1 >= self.best_top1:
            self.best_top1, self._is_new_best = top1, True
        return top1

    def artefacts(self) -> dict[str, Callable[[Path], None]]:
        is_first = not (self.folder / "state.pt").exists()
        if not (self._is_new_best or is_first or self.validation is None):
            return {}
        return {"weights.safetensors": partial(save_weights, self.written, None)}

    def save(self) -> None:
        super().save()
        self._is_new_best = False

    def state(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {**super().state(), "average": average, "best_top1": self.best_top1}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.best_top1 = state["best_top1"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def as_stated(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """Return the recipe with the architecture's arguments and the preprocessing of its checkpoint.

    Raises: as `open_checkpoint`.
    """
    checkpoint = _checkpoint(recipe)
    if checkpoint is None:
        return recipe
    arguments = {**checkpoint.arguments, **recipe.arguments}
    if "num_classes" not in recipe.arguments:
        del arguments["num_classes"]
    if checkpoint.pixels:
        arguments[_PIXELS] = {**checkpoint.pixels, **recipe.arguments.get(_PIXELS, {})}
    return replace(recipe, architecture=checkpoint.architecture, arguments=arguments)


def _checkpoint(recipe: FinetuneRecipe) -> Checkpoint | None:
    """Read the file or folder of weights, with the classes that it has. None where timm has them."""
    if recipe.weights in (None, "pretrained"):
        return None
    arguments = {name: value for name, value in recipe.arguments.items() if name != "num_classes"}
    return open_checkpoint(recipe.weights, recipe.architecture, arguments)


def _initial_vit(recipe: FinetuneRecipe) -> tuple[Any, list[str]]:
    """Return the recipe's ViT with its weights and a new head, and notes.

    Raises: ValueError or OSError, as `load_vit` and `open_checkpoint`.
    """
    arguments = {**recipe.arguments, "drop_path_rate": recipe.drop_path}
    n_classes = arguments.pop("num_classes")
    checkpoint = _checkpoint(recipe)
    if checkpoint is None:
        vit: Any = load_vit(recipe.architecture, weights=cast(Any, recipe.weights), **arguments)
        notes = [f"weights: {recipe.weights or 'random'}"]
    else:
        vit = load_vit(recipe.architecture, num_classes=checkpoint.arguments["num_classes"], **arguments)
        vit.load_state_dict(checkpoint.tensors)
        notes = [f"weights: {recipe.weights}", *checkpoint.notes]
    notes.append(f"the head is new: {n_classes} classes; that of the weights had {vit.num_classes}")
    vit.reset_classifier(n_classes)
    for name in ("head", "head_dist"):
        for parameter in getattr(vit, name, nn.Identity()).parameters():
            nn.init.zeros_(parameter)
    return vit, notes


def _with_classes(recipe: FinetuneRecipe, classes: Sequence[str]) -> FinetuneRecipe:
    named = recipe.arguments.get("num_classes", len(classes))
    if named != len(classes):
        raise ValueError(f"num_classes {named}: the images have {len(classes)} classes; leave it out")
    return replace(recipe, arguments={**recipe.arguments, "num_classes": len(classes)})


@torch.no_grad()
def _average(decay: float, averages: Any, current: Any, n_averaged: Tensor) -> None:
    """Move averages to the current weights; the decay is lower at first, for short runs."""
    n = float(n_averaged)
    torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))
