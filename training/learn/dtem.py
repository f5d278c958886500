"""Train DTEM's embedding, with a frozen ViT (modular) or together with it (end-to-end).

A run is a pure function of its recipe: each step seeds its randomness with the recipe's seed and
its own number. So a resumed run is bit-identical to an uninterrupted one, and several processes
take the same steps as one.
Source: arXiv 2412.10569, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.data.augmentation import Mixing
from training.data.training_images import TrainingImages
from training.evaluate.accuracy import measure
from training.learn.images import Validation, image_batches
from training.learn.learning_rate import half_cosine, warmup
from training.learn.losses import LOSSES
from training.learn.parameter_groups import parameter_groups
from training.learn.processes import Processes
from training.learn.recipe import AdamW, DtemRecipe
from training.learn.run_folder import RunLog, save_checkpoint, saved_state
from training.models.classifier import ServedClassifier
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


def learning_rate(n_seen: int, recipe: DtemRecipe, learner: AdamW) -> float:
    """Return the learning rate after `n_seen` images: linear warm-up, then half a cosine."""
    rate = half_cosine(n_seen / recipe.n_images, *learner.learning_rate)
    return rate * warmup(n_seen + recipe.batch_size, learner.warmup_images)


class DtemTraining:
    """A training run: modules, optimisers and steps taken, which a checkpoint saves and restores.

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
        torch.manual_seed(recipe.seed)
        recipe = recipe.counted_in_images(len(images))
        self.recipe, self.images, self.folder = recipe, images, folder
        self.processes, self.n_workers = processes, n_workers
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
        self.validation = validation
        self.learners: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
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
        data = recipe.data
        is_mixing = data.mixup > 0 or data.cutmix > 0
        self.mixing = Mixing(len(images.classes), mixup=data.mixup, cutmix=data.cutmix) if is_mixing else None
        self.n_steps_taken = 0

    @property
    def n_seen(self) -> int:
        return self.n_steps_taken * self.recipe.batch_size

    # --- one step ---

    def learner_of_step(self, step: int) -> str:
        """Return which part a step trains: "vit" or "embedding"."""
        if self.recipe.mode == "end-to-end":
            return "embedding" if step % EMBEDDING_STEP_EVERY == EMBEDDING_STEP_EVERY - 1 else "vit"
        return "embedding" if self.recipe.mode == "modular" else "vit"

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take one optimiser step; return its loss, accuracy, gradient norm and learning rate.

        Shapes: images float32 (B, 3, H, W), labels (B,): this process's part of the batch
        """
        name = self.learner_of_step(self.n_steps_taken)
        learner, settings = self.learners[name], cast(AdamW, getattr(self.recipe, name))
        rate = learning_rate(self.n_seen, self.recipe, settings)
        torch.manual_seed(_step_seed(self.recipe.seed, self.n_steps_taken, self.processes.rank))
        images, labels = images.to(self.processes.device), labels.to(self.processes.device)
        targets = labels
        if self.mixing is not None:
            draw = (self.recipe.seed, self.n_steps_taken, self.processes.rank)
            images, targets = self.mixing(images, labels, *draw)
        is_relaxed = name == "embedding" or self.recipe.mode == "soft keys"
        learner.requires_grad_(True)
        self.vit.train(name == "vit")
        loss, logits = self._backward(self.relaxed if is_relaxed else self.hard, images, targets)
        learner.requires_grad_(False)
        parameters = [parameter for parameter in learner.parameters() if parameter.grad is not None]
        self.processes.average(cast(Tensor, parameter.grad) for parameter in parameters)
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimiser = self.optimisers[name]
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
        self.n_steps_taken += 1
        figures = torch.stack([loss, (logits.argmax(1) == labels).float().mean()])
        self.processes.average([figures])
        return {
            f"{name}_loss": float(figures[0]),
            f"{name}_top1": float(figures[1]),
            f"{name}_gradient_norm": float(norm),
            f"{name}_learning_rate": rate,
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _backward(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the batch's mean loss; return the loss and the logits.

        Shapes: (), (B, classes)
        """
        n_images, n_at_once = len(images), self.recipe.micro_batch or len(images)
        losses, logits = [], []
        for first in range(0, n_images, n_at_once):
            part, wanted = images[first : first + n_at_once], targets[first : first + n_at_once]
            with self._autocast():
                found = model(part).float()
            loss = LOSSES[self.recipe.loss](found, wanted, label_smoothing=self.recipe.data.label_smoothing)
            loss = loss * (len(part) / n_images)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            logits.append(found.detach())
        return torch.stack(losses).sum(), torch.cat(logits)

    # --- the run ---

    def run(self, *, checkpoint_every: int = 200, until: int | None = None, stop: Event | None = None) -> bool:
        """Train to the end of the recipe, or resume; return whether the end was reached.

        Units: checkpoint_every and until in steps. stop: when set in any process, the run ends
            after the current step with a checkpoint. until: stop after this step without a
            checkpoint, as in a crash.
        """
        self.resume()
        last = min(self.recipe.n_steps, until or self.recipe.n_steps)
        log = RunLog(self.folder, self.n_seen) if self.processes.is_first else None
        with closing(log) if log else nullcontext(), self._progress(last) as progress:
            for images, labels in self._batches(last):
                figures = self.step(images, labels)
                progress.update(self.recipe.batch_size)
                progress.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
                if log:
                    log.write(self.n_seen, figures)
                if self.n_steps_taken % checkpoint_every == 0 or self.n_steps_taken == self.recipe.n_steps:
                    self._checkpoint(log)
                elif self.processes.any(stop is not None and stop.is_set()):
                    self.save()
                    return False
        return self.n_steps_taken == self.recipe.n_steps

    def _checkpoint(self, log: RunLog | None) -> None:
        """Validate, log, then save: the log always contains everything before the checkpoint."""
        if log and self.validation is not None:
            log.write(self.n_seen, {"validation_top1": self.validate(self.validation)})
        if log:
            log.flush()
        self.save()

    def validate(self, validation: Validation) -> float:
        """Return top-1 with hard merging at the recipe's r."""
        device = self.processes.device
        classifier = ServedClassifier(self.hard, validation.rule).to(device).eval()

        @torch.no_grad()
        def classify(pixels: Tensor) -> Tensor:
            with self._autocast():
                logits: Tensor = classifier(pixels.to(device))
            return logits.cpu()

        return measure(classify, validation.batches).value

    def _progress(self, last: int) -> Any:
        return tqdm(
            total=last * self.recipe.batch_size,
            initial=self.n_seen,
            unit="image",
            smoothing=0.05,
            disable=not self.processes.is_first,
        )

    def _batches(self, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        return image_batches(
            self.images,
            seed=self.recipe.seed,
            first_step=self.n_steps_taken,
            n_steps=last,
            batch_size=self.recipe.batch_size,
            rank=self.processes.rank,
            n_processes=self.processes.count,
            n_workers=self.n_workers,
        )

    # --- checkpoints: state.pt to resume; embedding.safetensors and weights.safetensors for other programs ---

    def save(self) -> None:
        """Write a checkpoint in the first process; a frozen ViT with the first checkpoint only."""
        if not self.processes.is_first:
            return
        has_checkpoint = (self.folder / "state.pt").exists()
        artefacts: dict[str, Callable[[Path], None]] = {}
        if "embedding" in self.learners:
            artefacts["embedding.safetensors"] = self.embedding.save
        if "vit" in self.learners or not has_checkpoint:
            artefacts["weights.safetensors"] = partial(save_weights, self.vit, None)
        state = {
            "learners": {name: module.state_dict() for name, module in self.learners.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "n_steps_taken": self.n_steps_taken,
        }
        save_checkpoint(self.folder, self.recipe, state, artefacts)

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one. Raises: ValueError for another recipe's."""
        state = self.processes.from_first(lambda: saved_state(self.folder, self.recipe))
        if state is None:
            return
        for name, module in self.learners.items():
            module.load_state_dict(state["learners"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])
        self.n_steps_taken = state["n_steps_taken"]


def _check_fits(model: MergingVisionTransformer, recipe: DtemRecipe, n_classes: int) -> None:
    if model.vit.num_classes != n_classes:
        raise ValueError(f"{recipe.architecture} has {model.vit.num_classes} classes, the images {n_classes}")
    if recipe.n_steps < 1:
        raise ValueError(f"n_images {recipe.n_images}: expected at least one batch_size of {recipe.batch_size}")
    if model.schedule[0] != recipe.r:
        raise ValueError(f"r {recipe.r}: the first block can remove {model.schedule[0]} of {model.tokens[0]} tokens")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank
