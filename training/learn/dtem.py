"""Train what DTEM merges by, the ViT frozen (modular) or learning with it (end-to-end), and what DTEM is compared with.

A run is a pure function of its recipe: every step draws its randomness from the seed and its own number, so a run that
was stopped resumes to the bit, and several processes take the steps that one would.
Source: arXiv 2412.10569, section 3.3.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.learn.images import TrainingImages, image_batches
from training.learn.processes import Processes
from training.learn.recipe import AdamW, DtemRecipe
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig, default_dim
from training.models.relaxed import RelaxedVisionTransformer
from training.models.vit import MergingVisionTransformer, load_vit

EMBEDDING_STEP_EVERY = 10  # end-to-end: of so many steps the last is the embedding's


def learning_rate(n_seen: int, recipe: DtemRecipe, learner: AdamW) -> float:
    """Return the rate of the step after `n_seen` images: linear warm-up, then half a cosine."""
    begin, end = learner.learning_rate
    share = min(1.0, n_seen / recipe.n_images)
    warmth = min(1.0, (n_seen + recipe.batch_size) / learner.warmup_images) if learner.warmup_images else 1.0
    return warmth * (end + (begin - end) * (1 + math.cos(math.pi * share)) / 2)


class DtemTraining:
    """The state of one run: what learns, its optimisers, steps taken; what a checkpoint saves and restores."""

    def __init__(
        self, recipe: DtemRecipe, images: TrainingImages, folder: Path, *, processes: Processes, n_workers: int
    ) -> None:
        torch.manual_seed(recipe.seed)
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
        metric: Any = self.embedding if recipe.embedding else "keys"
        # On CPUs the backward pass of fused attention is slower than the matrix products it fuses.
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
                    _parameter_groups(module, settings.weight_decay), betas=settings.betas, fused=True
                )
        self.mixup = _mixup(recipe, images.n_classes)
        self.n_steps_taken = 0

    @property
    def n_seen(self) -> int:
        return self.n_steps_taken * self.recipe.batch_size

    # --- one step ---

    def learner_of_step(self, step: int) -> str:
        """Return who learns: "vit" or "embedding"."""
        if self.recipe.mode == "end-to-end":
            return "embedding" if step % EMBEDDING_STEP_EVERY == EMBEDDING_STEP_EVERY - 1 else "vit"
        return "embedding" if self.recipe.mode == "modular" else "vit"

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take one optimiser step; return the loss, the batch's accuracy and the learning rate.

        Shapes: images float32 (B, 3, H, W), labels (B,): this process's part of the batch
        """
        name = self.learner_of_step(self.n_steps_taken)
        learner, settings = self.learners[name], cast(AdamW, getattr(self.recipe, name))
        rate = learning_rate(self.n_seen, self.recipe, settings)
        torch.manual_seed(_step_seed(self.recipe.seed, self.n_steps_taken, self.processes.rank))
        images, labels = images.to(self.processes.device), labels.to(self.processes.device)
        images, targets = self.mixup(images, labels, self.n_steps_taken, self.processes.rank)
        is_relaxed = name == "embedding" or self.recipe.mode == "soft keys"
        model = self.relaxed if is_relaxed else self.hard
        learner.requires_grad_(True)
        self.vit.train(name == "vit")
        with torch.autocast(self.processes.device.type, torch.bfloat16):
            logits = model(images).float()
        loss = functional.cross_entropy(logits, targets, label_smoothing=self.recipe.data.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
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
        figures = torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
        self.processes.average([figures])
        return {
            f"{name}_loss": float(figures[0]),
            f"{name}_top1": float(figures[1]),
            f"{name}_gradient_norm": float(norm),
            f"{name}_learning_rate": rate,
        }

    # --- the run ---

    def run(self, *, checkpoint_every: int = 200, until: int | None = None) -> None:
        """Train to the end of the recipe from wherever the run stands. Units: in steps.

        until: stop after so many steps, as if the machine had failed there.
        """
        self.resume()
        last = min(self.recipe.n_steps, until or self.recipe.n_steps)
        batches = image_batches(
            self.images,
            seed=self.recipe.seed,
            first_step=self.n_steps_taken,
            n_steps=last,
            batch_size=self.recipe.batch_size,
            rank=self.processes.rank,
            n_processes=self.processes.count,
            n_workers=self.n_workers,
        )
        log = _Log(self.folder, self.n_seen) if self.processes.is_first else None
        progress = tqdm(
            total=last * self.recipe.batch_size,
            initial=self.n_seen,
            unit="image",
            smoothing=0.05,
            disable=not self.processes.is_first,
        )
        try:
            for images, labels in batches:
                figures = self.step(images, labels)
                progress.update(self.recipe.batch_size)
                progress.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
                if log:
                    log.write(self.n_seen, figures)
                if self.n_steps_taken % checkpoint_every == 0 or self.n_steps_taken == self.recipe.n_steps:
                    self.save()
        finally:
            progress.close()
            if log:
                log.close()

    # --- checkpoints: state.pt resumes; embedding.safetensors and weights.safetensors are what others load ---

    def save(self) -> None:
        """Write the checkpoint; each file under a temporary name, then renamed, state.pt last."""
        if not self.processes.is_first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.json").write_text(_as_json(self.recipe))
        if "embedding" in self.learners:
            self.embedding.save(_temporary(self.folder / "embedding.safetensors"))
            _keep(self.folder / "embedding.safetensors")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.vit.state_dict().items()}
        save_file(tensors, _temporary(self.folder / "weights.safetensors"))
        _keep(self.folder / "weights.safetensors")
        state = {
            "learners": {name: module.state_dict() for name, module in self.learners.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "n_steps_taken": self.n_steps_taken,
        }
        torch.save(state, _temporary(self.folder / "state.pt"))
        _keep(self.folder / "state.pt")

    def resume(self) -> None:
        """Take up the run where its last checkpoint left it.

        Raises: ValueError where the folder holds the run of another recipe.
        """
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "state.pt").exists():
            return
        if (self.folder / "recipe.json").read_text() != _as_json(self.recipe):
            raise ValueError(f"{self.folder} holds a run of another recipe: give another folder")
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location=self.processes.device)
        for name, module in self.learners.items():
            module.load_state_dict(state["learners"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])
        self.n_steps_taken = state["n_steps_taken"]


class _Log:
    """Every step's figures, as JSON lines and to TensorBoard; what was written after the checkpoint is dropped."""

    def __init__(self, folder: Path, n_seen: int) -> None:
        file = folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(line for line in lines if json.loads(line)["n_seen"] <= n_seen))
        self._lines = file.open("a", buffering=1)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=n_seen + 1)

    def write(self, n_seen: int, figures: dict[str, float]) -> None:
        self._lines.write(json.dumps({"n_seen": n_seen, "time": time.time(), **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name.replace("_", "/", 1), value, n_seen)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _mixup(recipe: DtemRecipe, n_classes: int) -> Any:
    return lambda images, labels, step, rank: (images, labels)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


def _as_json(recipe: DtemRecipe) -> str:
    return json.dumps(asdict(recipe), indent=2)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _keep(path: Path) -> None:
    _temporary(path).replace(path)
