"""Training images in an order that depends on the seed alone: whoever resumes, and by however many processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.digits import LABELS, draw
from training.data.random_words import RandomWords

_ORDER_SEED = 78


class TrainingImages(Protocol):
    """Images to learn from, as a ViT reads them.

    Shapes: an item is float32 (3, H, W), normalised, and the index of its class. `epoch` varies the augmentation: the
    same index and epoch give the same bits.
    """

    @property
    def n_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class DigitImages:
    """The first `n_distinct` training images of the reference task; they are not augmented."""

    n_distinct: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    n_classes: int = len(LABELS)

    def __len__(self) -> int:
        return self.n_distinct

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]:
        scene = draw("train", index)
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1), scene.label


class _Positions(Dataset[tuple[Tensor, int]]):
    """The run as one long row of images: epoch after epoch, each shuffled anew."""

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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of the batches of steps `first_step` … `n_steps - 1`.

    Shapes: float32 (B / n_processes, 3, H, W), (B / n_processes,)
    Raises: ValueError where the processes cannot share a batch evenly.
    """
    if batch_size % n_processes:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {n_processes} processes")
    own = batch_size // n_processes
    batches = [
        range(step * batch_size + rank * own, step * batch_size + (rank + 1) * own)
        for step in range(first_step, n_steps)
    ]
    yield from DataLoader(
        cast(Any, _Positions(images, seed)),
        batch_sampler=cast(Any, batches),
        num_workers=n_workers,
        prefetch_factor=4 if n_workers else None,
    )
