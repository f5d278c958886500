"""The loop of runs that learn from images: steps, checkpoints, validation, and resuming.

A run is a pure function of its recipe: each step seeds its randomness with the recipe's seed and
its own number. So a resumed run is bit-identical to an uninterrupted one, and several processes
take the same steps as one.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from training.data.augmentation import Mixing
from training.data.training_images import TrainingImages
from training.evaluate.accuracy import measure
from training.learn.finite import check_finite
from training.learn.images import Validation, image_batches
from training.learn.learning_rate import half_cosine, warmup
from training.learn.losses import LOSSES
from training.learn.picture import draw_learning
from training.learn.processes import Processes, describe_device
from training.learn.progress import StepProgress
from training.learn.recipe import AdamW, ImageRecipe
from training.learn.run_folder import METRICS, RunLog, opened_folder, save_checkpoint, saved_state
from training.learn.session import recorded_session
from training.models.classifier import ServedClassifier
from training.models.vit import MergingVisionTransformer

R = TypeVar("R", bound=ImageRecipe)
T = TypeVar("T")


def learning_rate(n_seen: int, recipe: ImageRecipe, learner: AdamW) -> float:
    """Return the learning rate after `n_seen` images: linear warm-up, then half a cosine."""
    rate = half_cosine(n_seen / recipe.n_images, *learner.learning_rate)
    return rate * warmup(n_seen + recipe.batch_size, learner.warmup_images)


class ImageTraining(ABC, Generic[R]):
    """A training run: modules, optimisers and steps taken, which a checkpoint saves and restores.

    recipe: with its length in images. vit: the whole model. learners: the modules that learn, by
        name; optimisers have the same names. notes: for the user, before the run.
    Raises: ValueError where the run is shorter than one batch.
    """

    vit: Any
    learners: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    notes: Sequence[str] = ()

    def __init__(
        self,
        recipe: R,
        images: TrainingImages,
        folder: Path,
        *,
        validation: Validation | None = None,
        processes: Processes,
        n_workers: int,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe = recipe.counted_in_images(len(images))
        if recipe.n_steps < 1:
            raise ValueError(f"n_images {recipe.n_images}: expected at least one batch_size of {recipe.batch_size}")
        self.images, self.folder, self.validation = images, folder, validation
        self.processes, self.n_workers = processes, n_workers
        data = recipe.data
        is_mixing = data.mixup > 0 or data.cutmix > 0
        self.mixing = Mixing(len(images.classes), mixup=data.mixup, cutmix=data.cutmix) if is_mixing else None
        self.learners, self.optimisers = {}, {}
        self.n_steps_taken = 0

    @abstractmethod
    def learner_of_step(self, step: int) -> str:
        """Return the name of the part that a step trains."""

    @abstractmethod
    def settings_of(self, learner: str) -> AdamW: ...

    @abstractmethod
    def model_of(self, learner: str) -> nn.Module:
        """Return the model whose loss trains a part."""

    @property
    @abstractmethod
    def validated(self) -> MergingVisionTransformer:
        """The model that is validated."""

    @abstractmethod
    def artefacts(self) -> dict[str, Callable[[Path], None]]:
        """Return what a checkpoint holds for other programs: file name -> function that writes it."""

    @property
    def n_seen(self) -> int:
        return self.n_steps_taken * self.recipe.batch_size

    # --- one step ---

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take one optimiser step; return its loss, accuracy, gradient norm and learning rate.

        Shapes: images float32 (B, 3, H, W), labels (B,): this process's part of the batch
        Raises: ValueError where loss or gradient norm is not finite; no weight has changed then.
        """
        name = self.learner_of_step(self.n_steps_taken)
        learner, settings = self.learners[name], self.settings_of(name)
        rate = learning_rate(self.n_seen, self.recipe, settings)
        torch.manual_seed(_step_seed(self.recipe.seed, self.n_steps_taken, self.processes.rank))
        images, labels = images.to(self.processes.device), labels.to(self.processes.device)
        targets = labels
        if self.mixing is not None:
            draw = (self.recipe.seed, self.n_steps_taken, self.processes.rank)
            images, targets = self.mixing(images, labels, *draw)
        learner.requires_grad_(True)
        self.vit.train(learner is self.vit)
        loss, logits = self._backward(self.model_of(name), images, targets)
        learner.requires_grad_(False)
        parameters = [parameter for parameter in learner.parameters() if parameter.grad is not None]
        self.processes.average(cast(Tensor, parameter.grad) for parameter in parameters)
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        figures = torch.stack([loss, (logits.argmax(1) == labels).float().mean()])
        self.processes.average([figures])
        # Both are averages over all processes, so all end together.
        check_finite(self.n_steps_taken + 1, loss=float(figures[0]), gradient_norm=float(norm))
        optimiser = self.optimisers[name]
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimiser.step()
        optimiser.zero_grad()
        self.n_steps_taken += 1
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
        agreed = self.processes.agreed
        with self._opened() as log:
            last = min(self.recipe.n_steps, until or self.recipe.n_steps)
            shown = StepProgress(self.recipe.n_images, self.n_seen, is_shown=self.processes.is_first)
            with shown as progress, closing(self._batches(last)) as batches:
                while (batch := agreed(partial(next, batches, None))) is not None:
                    figures = agreed(partial(self.step, *batch))
                    progress.advance(self.recipe.batch_size, f"loss {next(iter(figures.values())):.4f}")
                    is_stopping = self.processes.any(stop is not None and stop.is_set())
                    if agreed(partial(self._record, log, figures, checkpoint_every, is_stopping)):
                        progress.checkpoint()
                    if is_stopping:
                        break
        return self.n_steps_taken == self.recipe.n_steps

    @contextmanager
    def _opened(self) -> Iterator[RunLog | None]:
        """Open the run's folder in the first process, and resume a run that is there."""
        with ExitStack() as stack:

            def entered(opened: Callable[[], AbstractContextManager[T]]) -> T | None:
                return self.processes.agreed(lambda: stack.enter_context(opened()) if self.processes.is_first else None)

            entered(lambda: opened_folder(self.folder, self._checkpoint_bytes()))
            self.resume()
            session = entered(lambda: recorded_session(self.folder, self._facts()))
            yield entered(self._opened_log)
            if session is not None:
                session["to_n_seen"] = self.n_seen

    def _facts(self) -> dict[str, Any]:
        return {
            "device": describe_device(self.processes.device),
            "n_processes": self.processes.count,
            "n_images": len(self.images),
            "from_n_seen": self.n_seen,
        }

    def _opened_log(self) -> AbstractContextManager[RunLog]:
        if self.validation is not None and self.n_steps_taken < self.recipe.n_steps:
            # An image that cannot be read ends the run before its first step.
            _ = self.validation.batches
        return closing(RunLog(self.folder, self.n_seen))

    def _record(self, log: RunLog | None, figures: dict[str, float], checkpoint_every: int, is_stopping: bool) -> bool:
        """Log the step, and save a checkpoint where one is due; return whether it was.

        The log always contains everything before the checkpoint.
        """
        if log is None:
            return False
        log.write(self.n_seen, figures)
        is_last = self.n_steps_taken == self.recipe.n_steps
        if self.validation is not None and (is_last or self.is_validation_due(checkpoint_every)):
            log.write(self.n_seen, {"validation_top1": self.validate(self.validation)})
        elif self.n_steps_taken % checkpoint_every and not (is_last or is_stopping):
            return False
        log.flush()
        self.save()
        return True

    def is_validation_due(self, checkpoint_every: int) -> bool:
        """Return whether to validate after the step that was just taken."""
        return self.n_steps_taken % checkpoint_every == 0

    def validate(self, validation: Validation) -> float:
        """Return top-1 of the validated model."""
        device = self.processes.device
        classifier = ServedClassifier(self.validated, validation.rule).to(device).eval()

        @torch.no_grad()
        def classify(pixels: Tensor) -> Tensor:
            with self._autocast():
                logits: Tensor = classifier(pixels.to(device))
            return logits.cpu()

        return measure(classify, validation.batches).value

    def _batches(self, last: int) -> Generator[tuple[Tensor, Tensor], None, None]:
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

    # --- checkpoints: state.pt to resume, and artefacts for other programs ---

    def state(self) -> dict[str, Any]:
        return {
            "learners": {name: module.state_dict() for name, module in self.learners.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "n_steps_taken": self.n_steps_taken,
        }

    def save(self) -> None:
        """Write a checkpoint in the first process."""
        if self.processes.is_first:
            labels = json.dumps(list(self.images.classes), ensure_ascii=False)
            artefacts: dict[str, Callable[[Path], Any]] = {
                "labels.json": lambda file: file.write_text(labels),
                "learning.png": partial(draw_learning, self.folder / METRICS),
                **self.artefacts(),
            }
            save_checkpoint(self.folder, self.recipe, self.state(), artefacts)

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one. Raises: ValueError for another recipe's."""
        state = self.processes.from_first(lambda: saved_state(self.folder, self.recipe))
        if state is not None:
            self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        for name, module in self.learners.items():
            module.load_state_dict(state["learners"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])
        self.n_steps_taken = state["n_steps_taken"]

    def _checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: weights, and three times what learns (AdamW's averages)."""
        learning = sum(_size(module) for module in self.learners.values())
        return _size(self.vit) + 4 * learning + 1_000_000


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank
