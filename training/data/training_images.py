"""Images to learn from: each a pure function of its index, the epoch and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from training.data.augmentation import Augmentation, seeded
from training.data.digits import LABELS, draw
from training.data.folders import find_classes, match_labels, shown
from training.data.preprocessing import read_whole
from training.data.random_words import RandomWords

_AUGMENTATION_SEED, _SHARE_SEED = 80, 81


class TrainingImages(Protocol):
    """Images to learn from, as a ViT reads them.

    Shapes: an item is float32 (3, H, W), normalised, and the index of its class. `epoch` varies the
        augmentation; equal index and epoch give identical bits.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class TrainingDigits:
    """The first `n_distinct` training images of the reference task, without augmentation."""

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


class AugmentedFolder:
    """Image files under `<root>/<class>/`, or a share of each class, augmented anew in each epoch.

    The share of a class of n images is round(share * n), and at least one image, so that no class
    is empty. labels: of the model's outputs, in their order; None means the names of the folders.
    For equal seeds, a larger share contains the smaller ones.
    Raises: FileNotFoundError where the folder is missing, or one of its classes has no image.
    """

    def __init__(
        self,
        root: Path,
        augment: Augmentation,
        *,
        seed: int,
        share: float = 1.0,
        labels: Sequence[str] | None = None,
    ) -> None:
        folders = find_classes(root)
        if folders.empty:
            raise FileNotFoundError(f"{root}: the class folders {shown(folders.empty)} have no image")
        self.classes: Sequence[str] = folders.names if labels is None else labels
        indices = match_labels(folders, self.classes)
        self._augment, self._seed = augment, seed
        samples = [(str(file), indices[name]) for name, files in folders.images.items() for file in files]
        if share < 1:
            samples = [samples[index] for index in _shared([label for _, label in samples], share, seed)]
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def draw(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """Raises: ValueError naming a file that cannot be read."""
        file, label = self._samples[index]
        try:
            image = read_whole(Path(file))
        except Exception as err:  # noqa: BLE001 - decoders raise many kinds of errors
            raise ValueError(f"training image {file} cannot be read: {err or type(err).__name__}") from None
        with seeded(_AUGMENTATION_SEED, self._seed, epoch, index):
            return self._augment(image), label


def _shared(labels: Sequence[int], share: float, seed: int) -> list[int]:
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    kept: list[int] = []
    for label, indices in members.items():
        order = RandomWords(_SHARE_SEED, seed, label).permutation(len(indices))
        kept += [indices[place] for place in sorted(order[: max(1, round(share * len(indices)))])]
    return kept
