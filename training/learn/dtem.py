"""Train DTEM's embedding, with a frozen ViT (modular) or together with it (end-to-end).

Source: arXiv 2412.10569, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from training.data.training_images import TrainingImages
from training.learn.image_training import ImageTraining
from training.learn.images import Validation
from training.learn.parameter_groups import parameter_groups
from training.learn.processes import Processes
from training.learn.recipe import AdamW, DtemRecipe
from training.models.embedding import (
    DecoupledEmbedding,
    EmbeddingConfig,
    default_dim,
    start_from,
)
from training.models.relaxed import RelaxedVisionTransformer
from training.models.vit import MergingVisionTransformer, load_vit
from training.models.weights import save_weights

EMBEDDING_STEP_EVERY = 10
"""In mode end-to-end, every tenth step trains the embedding, the others the ViT."""


class DtemTraining(ImageTraining[DtemRecipe]):
    """A run that trains the embedding, the ViT, or both.

    Raises: ValueError where the number of classes differs between images and model, the run is
        shorter than one batch, or the first block has too few tokens to remove r.
    """

    def __init__(
        self,
        recipe: DtemRecipe,
        images: TrainingImages,
        folder: Path,
        *,
        validation: Validation | None = None,
        processes: Processes,
        n_workers: int,
    ) -> None:
        super().__init__(recipe, images, folder, validation=validation, processes=processes, n_workers=n_workers)
        weights = "pretrained" if recipe.weights == "pretrained" else Path(recipe.weights)
        self.vit = cast(Any, load_vit(recipe.architecture, weights=weights, **recipe.arguments))  # type: ignore[arg-type]
        self.embedding = DecoupledEmbedding(
            EmbeddingConfig(
                depth=len(self.vit.blocks),
                width=int(self.vit.embed_dim),
                dim=recipe.dim or default_dim(int(self.vit.embed_dim)),
                r=recipe.r,
                relaxation=recipe.relaxation,
                recipe=recipe.file,
            )
        )
        if recipe.embedding_weights:
            start_from(self.embedding, Path(recipe.embedding_weights))
        metric: Any = self.embedding if recipe.embedding else "keys"
        # On CPUs the backward pass of fused attention is slower than separate matrix products.
        is_cpu = processes.device.type == "cpu"
        self.hard = MergingVisionTransformer(
            self.vit, recipe.r, exhausted="reduce", metric=metric, attention="plain" if is_cpu else "masked"
        ).to(processes.device)
        self.relaxed = RelaxedVisionTransformer(
            self.vit,
            recipe.r,
            exhausted="reduce",
            metric=metric,
            relaxation=recipe.relaxation,
            keep_tail=recipe.keep_tail,
            attention="plain_augmented_values" if is_cpu else "augmented_values",
        ).to(processes.device)
        _check_fits(self.hard, recipe, len(images.classes))
        for name, module, settings in (
            ("vit", self.vit, recipe.vit),
            ("embedding", self.embedding, recipe.embedding),
        ):
            module.requires_grad_(False)
            if settings is not None:
                self.learners[name] = module
                self.optimisers[name] = torch.optim.AdamW(
                    parameter_groups(module, settings.weight_decay), betas=settings.betas, fused=True
                )

    @property
    def validated(self) -> MergingVisionTransformer:
        """Merging is hard, at the recipe's r."""
        return self.hard

    def learner_of_step(self, step: int) -> str:
        """Return which part a step trains: "vit" or "embedding"."""
        if self.recipe.mode == "end-to-end":
            return "embedding" if step % EMBEDDING_STEP_EVERY == EMBEDDING_STEP_EVERY - 1 else "vit"
        return "embedding" if self.recipe.mode == "modular" else "vit"

    def settings_of(self, learner: str) -> AdamW:
        return cast(AdamW, getattr(self.recipe, learner))

    def model_of(self, learner: str) -> nn.Module:
        is_relaxed = learner == "embedding" or self.recipe.mode == "soft keys"
        return self.relaxed if is_relaxed else self.hard

    def artefacts(self) -> dict[str, Callable[[Path], None]]:
        """A frozen ViT is written with the first checkpoint only."""
        artefacts: dict[str, Callable[[Path], None]] = {}
        if "embedding" in self.learners:
            artefacts["embedding.safetensors"] = self.embedding.save
        if "vit" in self.learners or not (self.folder / "state.pt").exists():
            artefacts["weights.safetensors"] = partial(save_weights, self.vit, None)
        return artefacts


def _check_fits(model: MergingVisionTransformer, recipe: DtemRecipe, n_classes: int) -> None:
    if model.vit.num_classes != n_classes:
        raise ValueError(f"{recipe.architecture} has {model.vit.num_classes} classes, the images {n_classes}")
    if model.schedule[0] != recipe.r:
        raise ValueError(f"r {recipe.r}: the first block can remove {model.schedule[0]} of {model.tokens[0]} tokens")
