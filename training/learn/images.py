"""Batches of training images, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from training.data.preprocessing import InputRule
from training.data.random_words import RandomWords
from training.data.sources import Source, find_dataset
from training.data.training_images import TrainingImages
from training.learn.processes import obey_parent_only
from training.learn.recipe import Data

_ORDER_SEED = 78


class Validation:
    """Held-out images for validation during training, read once and cached."""

    def __init__(self, source: Source, rule: InputRule, *, n_workers: int = 0) -> None:
        self.source, self.rule, self._n_workers = source, rule, n_workers

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Shapes: uint8 (B, H, W, 3), (B,)

        Raises: ValueError or OSError naming a file that cannot be read.
        """
        return list(_loaded(self.source, self._n_workers, batch_size=100))


def training_images(data: Data, rule: InputRule, seed: int) -> TrainingImages:
    """Open the images that a recipe learns from.

    Raises: FileNotFoundError; ValueError for an augmentation that timm does not know.
    """
    return find_dataset(data.source).open_training(data, rule, seed)


def validation_images(data: Data, rule: InputRule, classes: Sequence[str], *, n_workers: int = 0) -> Validation | None:
    """Open the images that a recipe validates on, None where it names none.

    Raises: FileNotFoundError; ValueError where they have other classes than the training images.
    """
    source = find_dataset(data.source).open_validation(data, rule)
    if source is None:
        return None
    if list(source.labels) != list(classes):
        differing = ", ".join(sorted(set(source.labels) ^ set(classes))[:5])
        raise ValueError(
            f"validation folder {data.validation or data.source} has other classes than {data.source}: {differing}"
        )
    return Validation(source, rule, n_workers=n_workers)


class _Positions(Dataset[tuple[Tensor, int]]):
    """The run as one sequence of images: epoch after epoch, each in a new order."""

    def __init__(self, images: TrainingImages, seed: int) -> None:
        self.images, self.seed = images, seed
        self._epoch, self._order = -1, cast(Any, None)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        epoch, place = divmod(position, len(self.images))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, RandomWords(_ORDER_SEED, self.seed, epoch).permutation(len(self.images))
        return self.images.draw(int(self._order[place]), epoch)


def image_batches(
    images: TrainingImages,
    *,
    seed: int,
    first_step: int,
    n_steps: int,
    batch_size: int,
    rank: int = 0,
    n_processes: int = 1,
    n_workers: int = 0,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield this process's part of the batches of steps `first_step` … `n_steps - 1`.

    Shapes: float32 (B / n_processes, 3, H, W), (B / n_processes,)
    Raises: ValueError where the batch size is not a multiple of the number of processes, or naming
        a file that cannot be read.
    """
    if batch_size % n_processes:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {n_processes} processes")
    n_part = batch_size // n_processes
    batches = [
        range(step * batch_size + rank * n_part, step * batch_size + (rank + 1) * n_part)
        for step in range(first_step, n_steps)
    ]
    yield from _loaded(_Positions(images, seed), n_workers, batch_sampler=batches)


class _Caught(Dataset[Any]):
    """A dataset whose items are exceptions where reading fails.

    An exception that leaves a worker would arrive as text, with the worker's traceback.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.images[index]
        except (OSError, ValueError) as err:
            return err.with_traceback(None)


def _collated(items: list[Any]) -> Any:
    error = next((item for item in items if isinstance(item, Exception)), None)
    return default_collate(items) if error is None else error


def _loaded(images: Any, n_workers: int, **batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches that workers read. Raises: what reading an image raised."""
    loader = DataLoader(
        _Caught(images),
        num_workers=n_workers,
        prefetch_factor=4 if n_workers else None,
        worker_init_fn=obey_parent_only,
        collate_fn=_collated,
        **batches,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield tuple(batch)
