"""Train a plain ViT from scratch on the reference task. A run can resume after any interruption.

Three measures make it affordable on a CPU: position embeddings start as sines and cosines; patch
dropout keeps the digit's patches; and each kept patch learns a token label (arXiv 2104.10858), its
digit or background. The last stage uses neither patch dropout nor token labels, so the result is a
plain classifier of whole images.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.digits import LABELS, draw
from training.learn.finite import check_finite
from training.learn.learning_rate import half_cosine, warmup
from training.learn.losses import LOSSES, cross_entropy
from training.learn.parameter_groups import parameter_groups
from training.learn.picture import draw_learning
from training.learn.progress import StepProgress
from training.learn.recipe import Recipe, Stage
from training.learn.run_folder import METRICS, RunLog, opened_folder, save_checkpoint, saved_state
from training.learn.scenes import Batch, batches
from training.learn.session import recorded_session
from training.models.vit import MergingVisionTransformer, load_vit
from training.models.weights import save_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """Scale and normalise. Shapes: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def learning_rate(n_seen: int, recipe: Recipe) -> float:
    """Return the learning rate after `n_seen` images: linear warm-up, then half a cosine per stage."""
    first = 0
    for stage in recipe.stages[:-1]:
        if n_seen < first + stage.n_images:
            break
        first += stage.n_images
    else:
        stage = recipe.stages[-1]
    settings = recipe.optimiser
    rate = half_cosine((n_seen - first) / stage.n_images, *stage.learning_rate)
    return rate * warmup(n_seen + settings.batch_size, settings.warmup_images)


def sincos_positions(cells: int, width: int, temperature: float = 100.0) -> Tensor:
    """Return 2-D sine and cosine position embeddings, in which neighbours are similar.

    Temperature 100 spreads the frequencies over a grid of a dozen cells; with 10,000 most of them
    would be constant.
    Shapes: returns (cells², width)
    Source: arXiv 2205.01580, where they are fixed. Here they are the initial values.
    """
    frequencies = temperature ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(cells)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (cells, width / 2)
    rows, columns = waves[:, None].expand(-1, cells, -1), waves[None].expand(cells, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class BackboneTraining:
    """A training run: model, token-label head, optimiser and images seen."""

    def __init__(self, recipe: Recipe, folder: Path, *, n_workers: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.n_workers = recipe, folder, n_workers
        weights = Path(recipe.weights) if recipe.weights else None
        self.vit = cast(Any, load_vit(recipe.architecture, weights=weights, **recipe.arguments))
        self.n_prefix, width = int(self.vit.num_prefix_tokens), int(self.vit.embed_dim)
        if weights is None:
            with torch.no_grad():
                self.vit.pos_embed[0, self.n_prefix :] = sincos_positions(self.vit.patch_embed.grid_size[0], width)
        # On CPUs the backward pass of fused attention is slower than separate matrix products.
        self.model = MergingVisionTransformer(self.vit, 0, attention="plain")
        self.token_head = nn.Linear(width, len(LABELS) + 1)
        self.modules = nn.ModuleDict({"vit": self.vit, "token_head": self.token_head})
        groups = parameter_groups(self.modules, recipe.optimiser.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.n_seen = 0

    # --- one step ---

    def _tokens(self, batch: Batch) -> Tensor:
        """Run the blocks on the kept patches.

        Shapes: returns (B, 1 + K, C), after the final norm
        """
        tokens = self.model.embed(normalised(batch.images))
        kept = torch.take_along_dim(tokens[:, self.n_prefix :], batch.kept[..., None], 1)
        tokens, _, _ = self.model.encode(torch.cat([tokens[:, : self.n_prefix], kept], 1))
        normed: Tensor = self.vit.norm(tokens)
        return normed

    def step(self, batch: Batch, stage: Stage) -> dict[str, float]:
        """Take one optimiser step; return the losses and the batch's accuracy."""
        settings = self.recipe.optimiser
        rate = learning_rate(self.n_seen, self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self._tokens(batch)
            logits = self.vit.forward_head(tokens).float()
            token_logits = self.token_head(tokens[:, self.n_prefix :]).float()
        loss = LOSSES[self.recipe.loss](logits, batch.labels, label_smoothing=settings.label_smoothing)
        token_loss = cross_entropy(token_logits.flatten(0, 1), batch.token_labels.flatten(), label_smoothing=0.0)
        (loss + stage.token_label_weight * token_loss).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), settings.clip_norm)
        step = self.n_seen // settings.batch_size + 1
        check_finite(step, loss=loss.item() + token_loss.item(), gradient_norm=float(norm))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.n_seen += len(batch.labels)
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return {
            "loss": loss.item(),
            "token_loss": token_loss.item(),
            "accuracy": accuracy.item(),
            "learning_rate": rate,
        }

    # --- the run ---

    def run(self, *, checkpoint_every: int = 12_800) -> None:
        """Train to the end of the recipe, from the last checkpoint if there is one.

        Units: checkpoint_every in images
        """
        parameters = sum(parameter.numel() for parameter in self.modules.parameters())
        with ExitStack() as stack:
            # Weights, and for resuming the weights again with AdamW's two averages, in float32.
            stack.enter_context(opened_folder(self.folder, 16 * parameters + 1_000_000))
            self.resume()
            facts = {"device": "cpu", "n_processes": 1, "n_images": self._n_images, "from_n_seen": self.n_seen}
            session = stack.enter_context(recorded_session(self.folder, facts))
            log = stack.enter_context(closing(RunLog(self.folder, self.n_seen)))
            progress = stack.enter_context(StepProgress(self._n_images, self.n_seen))
            remaining = stack.enter_context(closing(self._remaining()))
            for stage, batch in remaining:
                figures = self.step(batch, stage)
                progress.advance(len(batch.labels), f"loss {figures['loss']:.4f}")
                log.write(self.n_seen, figures)
                session["to_n_seen"] = self.n_seen
                if self.n_seen == self._n_images:
                    self._checkpoint(log, n_images=2_000)
                    progress.checkpoint()
                elif self.n_seen % checkpoint_every < len(batch.labels):
                    self._checkpoint(log, n_images=500)
                    progress.checkpoint()

    @property
    def _n_images(self) -> int:
        """The images of the run: whole batches of each stage."""
        batch_size = self.recipe.optimiser.batch_size
        return sum(stage.n_images // batch_size * batch_size for stage in self.recipe.stages)

    def _checkpoint(self, log: RunLog, n_images: int) -> None:
        """Validate, log, then save: the log always contains everything before the checkpoint."""
        log.write(self.n_seen, {"validation_top1": self.validate(n_images)})
        log.flush()
        self.save()

    def _remaining(self) -> Generator[tuple[Stage, Batch], None, None]:
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
    def validate(self, n_images: int) -> float:
        """Return top-1 on the first validation images of the last stage's task, with all patches."""
        self.modules.eval()
        scenes = [draw("validation", i, self.recipe.stages[-1].task) for i in range(n_images)]
        right = 0
        with torch.autocast("cpu", torch.bfloat16):
            for first in range(0, n_images, 100):
                part = scenes[first : first + 100]
                images = torch.stack([torch.from_numpy(scene.image) for scene in part])
                found = self.model(normalised(images)).argmax(1)
                right += int((found == torch.tensor([scene.label for scene in part])).sum())
        self.modules.train()
        return right / n_images

    # --- checkpoints: state.pt to resume; weights.safetensors and recipe.json for other programs ---

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "n_seen": self.n_seen,
        }
        artefacts = {
            "learning.png": partial(draw_learning, self.folder / METRICS),
            "weights.safetensors": partial(save_weights, self.vit, None),
        }
        save_checkpoint(self.folder, self.recipe, state, artefacts)

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one. Raises: ValueError for another recipe's."""
        state = saved_state(self.folder, self.recipe)
        if state is None:
            return
        self.modules.load_state_dict(state["modules"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.n_seen = state["n_seen"]
