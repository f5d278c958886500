"""Train a plain ViT from scratch on the reference task, by a recipe, resumable after any stop.

Two things make it affordable on a CPU: patch dropout that keeps the digit's patches, and token labels (arXiv 2104.10858):
each kept patch also learns to say whether it is digit or background, which ends the plateau of training from scratch.
Both are gone in the last stage, so the model that ships is a plain classifier of whole images.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from training.data.digits import LABELS, draw
from training.learn.recipe import Optimiser, Recipe, Stage
from training.learn.scenes import Batch, batches
from training.models.vit import load_vit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """Scale and normalise. Shapes: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def learning_rate(n_seen: int, n_total: int, optimiser: Optimiser) -> float:
    """Linear warm-up, then a cosine down to the final rate at `n_total` images."""
    if n_seen < optimiser.warmup_images:
        return optimiser.learning_rate * (n_seen + optimiser.batch_size) / optimiser.warmup_images
    share = (n_seen - optimiser.warmup_images) / max(1, n_total - optimiser.warmup_images)
    fall = optimiser.learning_rate - optimiser.final_learning_rate
    return optimiser.final_learning_rate + fall * (1 + math.cos(math.pi * min(1.0, share))) / 2


class BackboneTraining:
    """The state of one run: model, token-label head, optimiser, images seen; what a checkpoint saves and restores."""

    def __init__(self, recipe: Recipe, folder: Path, *, n_workers: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.n_workers = recipe, folder, n_workers
        self.vit: Any = load_vit(recipe.architecture, weights=None, **recipe.arguments)
        self.token_head = nn.Linear(self.vit.embed_dim, len(LABELS) + 1)
        self.modules = nn.ModuleDict({"vit": self.vit, "token_head": self.token_head})
        self.optimiser = torch.optim.AdamW(self._parameter_groups(), fused=True)
        self.n_seen = 0

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed = [p for p in self.modules.parameters() if p.ndim > 1]
        others = [p for p in self.modules.parameters() if p.ndim <= 1]
        return [{"params": decayed, "weight_decay": self.recipe.optimiser.weight_decay}, {"params": others, "weight_decay": 0.0}]

    # --- one step ------------------------------------------------------------------------------------------------------

    def _tokens(self, batch: Batch) -> Tensor:
        """Run the blocks over the kept patches. Shapes: returns (B, 1 + K, C), normed."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(normalised(batch.images)))
        n_prefix, width = self.vit.num_prefix_tokens, tokens.shape[-1]
        patches = tokens[:, n_prefix:]
        if batch.kept.shape[1] < patches.shape[1]:
            patches = patches.gather(1, batch.kept[..., None].expand(-1, -1, width))
        else:  # every patch, in its own order: the labels are reordered instead
            batch.token_labels.copy_(batch.token_labels.gather(1, batch.kept.argsort(1)))
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(torch.cat([tokens[:, :n_prefix], patches], 1))))  # type: ignore[no-any-return]

    def step(self, batch: Batch, stage: Stage) -> dict[str, float]:
        """Take one optimiser step; return the losses and the batch's accuracy."""
        settings = self.recipe.optimiser
        rate = learning_rate(self.n_seen, self.recipe.n_images, settings)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self._tokens(batch)
            logits = self.vit.forward_head(tokens).float()
            token_logits = self.token_head(tokens[:, self.vit.num_prefix_tokens :]).float()
        loss = functional.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing)
        token_loss = functional.cross_entropy(token_logits.flatten(0, 1), batch.token_labels.flatten())
        (loss + stage.token_label_weight * token_loss).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), settings.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.n_seen += len(batch.labels)
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return {"loss": loss.item(), "token_loss": token_loss.item(), "accuracy": accuracy.item(), "learning_rate": rate}

    # --- the run -------------------------------------------------------------------------------------------------------

    def run(self, *, checkpoint_every: int = 12_800) -> None:
        """Train to the end of the recipe from wherever the run stands. Units: `checkpoint_every` in images."""
        self.resume()
        progress = tqdm(total=self.recipe.n_images, initial=self.n_seen, unit="image", smoothing=0.02)
        for stage, batch in self._remaining():
            figures = self.step(batch, stage)
            progress.update(len(batch.labels))
            progress.set_postfix({"stage": stage.name, "loss": f"{figures['loss']:.3f}", "top1": f"{figures['accuracy']:.3f}"})
            self._log({"n_seen": self.n_seen, "stage": stage.name, **figures})
            if self.n_seen % checkpoint_every < len(batch.labels):
                self.save()
                self._log({"n_seen": self.n_seen, "validation_top1": self.validate()})
        self.save()
        self._log({"n_seen": self.n_seen, "validation_top1": self.validate(2000)})

    def _remaining(self) -> Iterator[tuple[Stage, Batch]]:
        first = 0
        batch_size = self.recipe.optimiser.batch_size
        for stage in self.recipe.stages:
            n_images = stage.n_images // batch_size * batch_size
            done = min(n_images, max(0, self.n_seen - first))
            if done < n_images:
                for batch in batches(
                    stage.task,
                    first=first + done,
                    n_images=n_images - done,
                    batch_size=batch_size,
                    patch_pixels=self.vit.patch_embed.patch_size[0],
                    kept_patches=stage.kept_patches,
                    n_workers=self.n_workers,
                ):
                    yield stage, batch
            first += n_images

    @torch.no_grad()
    def validate(self, n_images: int = 500) -> float:
        """Measure top-1 on the first validation images of the last stage's task, every patch kept."""
        self.modules.eval()
        scenes = [draw("validation", i, self.recipe.stages[-1].task) for i in range(n_images)]
        right = 0
        with torch.autocast("cpu", torch.bfloat16):
            for first in range(0, n_images, 100):
                part = scenes[first : first + 100]
                images = torch.stack([torch.from_numpy(scene.image) for scene in part])
                found = self.vit(normalised(images)).argmax(1)
                right += int((found == torch.tensor([scene.label for scene in part])).sum())
        self.modules.train()
        return right / n_images

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"time": time.time(), **entry}) + "\n")

    # --- checkpoints: state.pt resumes, weights.safetensors is what others load, recipe.json says what made them -------

    def save(self) -> None:
        """Write the checkpoint; each file under a temporary name, then renamed, state.pt last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2))
        weights = self.folder / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in self.vit.state_dict().items()}, f"{weights}.tmp")
        os.replace(f"{weights}.tmp", weights)
        state = self.folder / "state.pt"
        content = {"modules": self.modules.state_dict(), "optimiser": self.optimiser.state_dict(), "n_seen": self.n_seen}
        torch.save(content, f"{state}.tmp")
        os.replace(f"{state}.tmp", state)

    def resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "state.pt"
        if not state.exists():
            return
        content = torch.load(state, weights_only=True)
        self.modules.load_state_dict(content["modules"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.n_seen = content["n_seen"]
