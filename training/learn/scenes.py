"""Batches of the reference task for training the backbone, drawn on demand in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.digits import LABELS, Task, digit_patches, draw, patch_ink
from training.data.random_words import RandomWords

# The eleventh token label.
BACKGROUND = len(LABELS)
_KEPT_SEED = 77


@dataclass(frozen=True)
class Batch:
    """Shapes: images uint8 (B, S, S, 3); labels (B,); kept (B, K); token_labels (B, K), 10 = background"""

    images: Tensor
    labels: Tensor
    kept: Tensor
    token_labels: Tensor


class _Scenes(Dataset[tuple[Tensor, int, Tensor, Tensor]]):
    def __init__(self, task: Task, patch_pixels: int, kept_patches: int) -> None:
        self.task, self.patch_pixels, self.kept_patches = task, patch_pixels, kept_patches

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, Tensor]:
        scene = draw("train", index, self.task)
        covered = patch_ink(scene.mask, self.patch_pixels)
        # The digit's patches come first, then the others in random order. A ViT ignores the order
        # of patches.
        order = RandomWords(_KEPT_SEED, index).permutation(len(covered))
        order = order[np.argsort(covered[order] == 0, kind="stable")][: self.kept_patches]
        is_digit = digit_patches(scene.mask, self.patch_pixels)[order]
        token_labels = np.where(is_digit, scene.label, BACKGROUND)
        return torch.from_numpy(scene.image), scene.label, torch.from_numpy(order), torch.from_numpy(token_labels)


def batches(
    task: Task, *, first: int, n_images: int, batch_size: int, patch_pixels: int, kept_patches: int, n_workers: int
) -> Iterator[Batch]:
    """Yield training images `first` … `first + n_images - 1` in order, in whole batches."""
    loader = DataLoader(
        _Scenes(task, patch_pixels, kept_patches),
        batch_size=batch_size,
        sampler=range(first, first + n_images),
        num_workers=n_workers,
        drop_last=True,
        prefetch_factor=4 if n_workers else None,
    )
    for images, labels, kept, token_labels in loader:
        yield Batch(images, labels, kept, token_labels)
