"""Training images in an order that depends on the seed alone: whoever resumes, and by however many processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from training.data.augmentation import Augmentation, augmentation, seeded
from training.data.digits import LABELS, draw
from training.data.preprocessing import InputRule, read_whole
from training.data.random_words import RandomWords
from training.data.sources import Source, open_source, pixel_batches
from training.learn.processes import ignore_stop_signals
from training.learn.recipe import Data

_ORDER_SEED, _AUGMENTATION_SEED, _SHARE_SEED = 78, 80, 81


class TrainingImages(Protocol):
    """Images to learn from, as a ViT reads them.

    Shapes: an item is float32 (3, H, W), normalised, and the index of its class. `epoch` varies the augmentation: the
    same index and epoch give the same bits.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class DigitImages:
    """The first `n_distinct` training images of the reference task; they are not augmented."""

    n_distinct: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: Sequence[str] = field(default=LABELS)

    def __len__(self) -> int:
        return self.n_distinct

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]:
        scene = draw("train", index)
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1), scene.label


class FolderImages:
    """Image files under `<root>/<class>/`, or a share of each class, augmented anew in each epoch.

    Of a class of n the share is round(share * n), but at least one image, so that no class is lost; a larger share
    holds the smaller ones of the same seed.
    Raises: FileNotFoundError where there is no such folder, or a class in it has no image.
    """

    def __init__(self, root: Path, augment: Augmentation, *, seed: int, share: float = 1.0) -> None:
        folder = ImageFolder(str(root))
        self.classes: Sequence[str] = folder.classes
        self._augment, self._seed = augment, seed
        self._samples: list[tuple[str, int]] = folder.samples
        if share < 1:
            self._samples = [folder.samples[index] for index in _shared(folder.targets, share, seed)]

    def __len__(self) -> int:
        return len(self._samples)

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """Raises: ValueError that names the file where it cannot be read."""
        file, label = self._samples[index]
        try:
            image = read_whole(Path(file))
        except (OSError, ValueError) as err:
            raise ValueError(f"{file} cannot be read: {err}") from err
        with seeded(_AUGMENTATION_SEED, self._seed, epoch, index):
            return self._augment(image), label


def _shared(labels: Sequence[int], share: float, seed: int) -> list[int]:
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    kept: list[int] = []
    for label, own in members.items():
        order = RandomWords(_SHARE_SEED, seed, label).permutation(len(own))
        kept += [own[place] for place in sorted(order[: max(1, round(share * len(own)))])]
    return kept


class Validation:
    """Held-out images that a run measures itself on, as a graph reads them; read once, and kept."""

    def __init__(self, source: Source, rule: InputRule, *, n_workers: int = 0) -> None:
        self.source, self.rule, self._n_workers = source, rule, n_workers

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Shapes: uint8 (B, H, W, 3), (B,)"""
        return list(pixel_batches(self.source, 100, self._n_workers))


def training_images(data: Data, rule: InputRule, seed: int) -> TrainingImages:
    """Open what a recipe learns from.

    Raises: FileNotFoundError; ValueError where timm does not know the augmentation.
    """
    if data.source == "digits":
        return DigitImages(data.n_distinct or 0, rule.mean, rule.std)
    augment = augmentation(rule, randaugment=data.randaugment, erasing=data.erasing)
    return FolderImages(Path(data.source), augment, seed=seed, share=data.share)


def validation_images(data: Data, rule: InputRule, classes: Sequence[str], *, n_workers: int = 0) -> Validation | None:
    """Open what a recipe measures itself on: of the digits their validation split, else the folder that it names.

    Raises: FileNotFoundError; ValueError where the folder has other classes than those learnt.
    """
    name = "digits" if data.source == "digits" else data.validation
    if name is None or not data.n_validation:
        return None
    source = open_source(name, rule, data.n_validation, "validation")
    if list(source.labels) != list(classes):
        differing = sorted(set(source.labels) ^ set(classes))
        raise ValueError(f"validation folder {name} has other classes than {data.source}: {', '.join(differing[:5])}")
    return Validation(source, rule, n_workers=n_workers)


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
        worker_init_fn=ignore_stop_signals,
    )
