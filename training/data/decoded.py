"""Images that are decoded once, for commands that read them several times."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor

from training.data.sources import Source, pixel_batches

MAX_MEMORY_BYTES = 2 << 30
"""More pixels are kept in a file."""
_BATCH = 64
Progress: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]


def _unseen(batches: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    return batches


class DecodedImages:
    """The images of a source, decoded. It is a source too, of the same name and split.

    folder: an existing one, for the file of pixels too large for memory. The file has no name, so
        it never outlives the process.
    progress: (batches, title, number of batches) -> the batches, shown while they are decoded.
    """

    def __init__(self, source: Source, folder: Path | None = None, progress: Progress = _unseen) -> None:
        self.name, self.split, self.labels = source.name, source.split, source.labels
        self.licence, self.credits = source.licence, source.credits
        self.pixels = _allocated(source, folder)
        labels: list[Any] = []
        # Workers cost seconds to start.
        n_workers = cpu_count() if len(source) > 4 * _BATCH else 0
        batches = pixel_batches(source, _BATCH, n_workers)
        for pixels, found in progress(batches, f"decode {source.name}", -(-len(source) // _BATCH)):
            self.pixels[len(labels) : len(labels) + len(pixels)] = pixels
            labels += list(found)
        self.answers = torch.stack(labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.pixels[index], self.answers[index]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in order. Shapes: uint8 (B, H, W, 3), (B, …)"""
        for first in range(0, len(self), batch_size):
            yield self.pixels[first : first + batch_size], self.answers[first : first + batch_size]


def pixel_bytes(source: Source) -> int:
    """Return the size of all images, decoded."""
    return len(source) * int(source[0][0].numel())


def _allocated(source: Source, folder: Path | None) -> Tensor:
    shape = (len(source), *source[0][0].shape)
    if pixel_bytes(source) <= MAX_MEMORY_BYTES:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:
        # The mapping keeps the file.
        return torch.from_numpy(np.memmap(cast(Any, file), np.uint8, "w+", shape=shape))
