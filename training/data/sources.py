"""Labelled pixels for evaluation and export: the reference task, or a folder of image files, one subfolder a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from training.data.digits import LABELS, REFERENCE_TASK, Split, Task, draw
from training.data.preprocessing import InputRule, read_pixels

REFERENCE_INPUT = InputRule(height=112, width=112, resize_shorter_side=112)


class Source(Protocol):
    """Images with labels. Shapes: an item is uint8 (H, W, 3) and the index of its class."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def licence(self) -> str: ...

    @property
    def credits(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass
class DigitScenes(Dataset[tuple[Tensor, int]]):
    """The reference task's images 0 … n_images - 1 of a split."""

    split: Split
    n_images: int
    task: Task = REFERENCE_TASK
    name: str = "digits-on-photographs"
    labels: Sequence[str] = LABELS
    licence: str = "CC BY 4.0 (digits), CC BY 2.0 (photographs)"
    credits: Sequence[str] = field(
        default=(
            "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
            "doi 10.24432/C50P49, CC BY 4.0, as carried by scikit-learn",
            "Photograph china.jpg by danielbuechele, CC BY 2.0, as carried by scikit-learn",
            "Photograph flower.jpg by vultilion, CC BY 2.0, as carried by scikit-learn",
        )
    )

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = draw(self.split, index, self.task)
        return torch.from_numpy(scene.image), scene.label


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Image files under `<root>/<class>/`, as ImageNet's validation set is laid out; every n-th where fewer are asked.

    Raises: FileNotFoundError where there is no such folder or no image in it.
    """

    licence, credits = "see the data's owner", ("see the data's owner",)

    def __init__(self, root: Path, rule: InputRule, n_images: int | None = None) -> None:
        folder = ImageFolder(str(root), loader=partial(_load, rule=rule))
        n_images = min(n_images or len(folder), len(folder))
        self._folder = folder
        self._indices = [index * len(folder) // n_images for index in range(n_images)]
        self.name, self.split, self.labels = root.resolve().parent.name or root.name, root.name, folder.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self._folder[self._indices[index]]
        return pixels, int(label)


def _load(path: str, rule: InputRule) -> Tensor:
    return torch.from_numpy(read_pixels(Path(path), rule))


def open_source(data: str, rule: InputRule, n_images: int | None, split: Split = "test") -> Source:
    """Open `digits` (the reference task) or a folder of images."""
    if data == "digits":
        return DigitScenes(split, n_images or 10_000)
    return FolderImages(Path(data), rule, n_images)


def pixel_batches(source: Source, batch_size: int, n_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order. Shapes: uint8 (B, H, W, 3), (B,)"""
    yield from DataLoader(cast(Any, source), batch_size=batch_size, num_workers=n_workers)
