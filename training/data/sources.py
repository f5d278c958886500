"""Datasets: the table of those that commands and recipes can name, and the images that they hold.

A dataset is named by its key in `DATASETS` or by a folder of image files with one subfolder per
class. To add a dataset, add a subclass of `NamedDataset` here and an entry to `DATASETS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.augmentation import augmentation
from training.data.digits import LABELS, REFERENCE_TASK, Split, Task, draw
from training.data.folders import UnreadableImage, find_classes, match_labels, read_labels, shown
from training.data.preprocessing import InputRule, read_pixels
from training.data.training_images import AugmentedFolder, TrainingDigits, TrainingImages

REFERENCE_INPUT = InputRule(height=112, width=112, resize_shorter_side=112)

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "eval", "test", "testing")
"""Names of folders that say which part of a dataset they hold; the folder above names the dataset."""


class Source(Protocol):
    """Images with labels. Shapes: an item is uint8 (H, W, 3) and its label.

    A label is the index of a class, or what the measure of another task compares with.
    """

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

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


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
    """Image files under `<root>/<class>/`; with n_images, every n-th file.

    labels: of the model's outputs, in their order; None means the names of the folders. A part of
        the classes suffices, since each keeps its index; see `match_labels`.
    Raises: FileNotFoundError where the folder is missing or has no image; ValueError naming folders
        without a label.
    """

    licence, credits = "see the data's owner", ("see the data's owner",)

    def __init__(
        self, root: Path, rule: InputRule, n_images: int | None = None, labels: Sequence[str] | None = None
    ) -> None:
        self.folders, self._rule = find_classes(root), rule
        self.labels = self.folders.names if labels is None else list(labels)
        own = {name: index for index, name in enumerate(self.folders.names)}
        indices = own if labels is None else match_labels(self.folders, labels)
        files = [(file, indices[name]) for name, files in self.folders.images.items() for file in files]
        n_images = min(n_images or len(files), len(files))
        self._files = [files[index * len(files) // n_images] for index in range(n_images)]
        folder = root.resolve()
        is_split = folder.name in SPLIT_FOLDERS and folder.parent.name
        self.name, self.split = (folder.parent.name, folder.name) if is_split else (folder.name, "all")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises: UnreadableImage"""
        file, label = self._files[index]
        try:
            return torch.from_numpy(read_pixels(file, self._rule)), label
        except Exception as err:  # Pillow raises many types, by format and defect
            raise UnreadableImage(f"{file} cannot be read: {err or type(err).__name__}") from err


def check_classes(n_outputs: int, source: Source) -> None:
    """Compare a model's outputs with the labels of a source, before any image is read.

    Raises: ValueError naming both.
    """
    if len(source.labels) == n_outputs:
        return
    where, note = source.name, ""
    if isinstance(source, FolderImages):
        where = str(source.folders.root)
        note = "; if they are a part of the outputs, name all as labels"
        if source.folders.empty:
            note = f"; folders without images are no classes: {shown(source.folders.empty)}" + note
    raise ValueError(
        f"{where} has {len(source.labels)} classes, the model {n_outputs} outputs: {shown(source.labels)}{note}"
    )


class LearningOptions(Protocol):
    """The options of a recipe's [data] that a dataset reads; see `training.learn.recipe.Data`."""

    @property
    def source(self) -> str: ...

    @property
    def validation(self) -> str | None: ...

    @property
    def labels(self) -> str | None: ...

    @property
    def n_validation(self) -> int: ...

    @property
    def n_distinct(self) -> int | None: ...

    @property
    def share(self) -> float: ...

    @property
    def randaugment(self) -> str | None: ...

    @property
    def erasing(self) -> float: ...

    @property
    def min_crop(self) -> float: ...

    @property
    def flip(self) -> float: ...


class NamedDataset(ABC):
    """A dataset as commands and recipes use it.

    has_splits: `open` knows train, validation and test; otherwise the split is ignored.
    input_rule: the preprocessing that belongs to the dataset; None means that of the model's
        weights.
    """

    name: str
    has_splits: bool
    input_rule: InputRule | None

    def rule(self, model_rule: Callable[[], InputRule]) -> InputRule:
        """Return the preprocessing: the dataset's own, or that of the model."""
        return self.input_rule if self.input_rule is not None else model_rule()

    @abstractmethod
    def open(self, rule: InputRule, n_images: int | None, split: Split = "test") -> Source:
        """Open the images of a split, unaugmented. Raises: FileNotFoundError"""

    @abstractmethod
    def open_training(self, options: LearningOptions, rule: InputRule, seed: int) -> TrainingImages:
        """Open the images to learn from.

        Raises: FileNotFoundError; ValueError for an unknown augmentation.
        """

    @abstractmethod
    def open_validation(self, options: LearningOptions, rule: InputRule) -> Source | None:
        """Open the images that a training run validates on, None where there are none.

        Raises: FileNotFoundError
        """

    @abstractmethod
    def check_options(self, options: LearningOptions) -> None:
        """Raises: ValueError naming a missing or unsupported option."""


class ReferenceTask(NamedDataset):
    """The reference task: images are drawn on demand, in three splits."""

    name, has_splits, input_rule = "digits", True, REFERENCE_INPUT

    def open(self, rule: InputRule, n_images: int | None, split: Split = "test") -> Source:
        return DigitScenes(split, n_images or 10_000)

    def open_training(self, options: LearningOptions, rule: InputRule, seed: int) -> TrainingImages:
        return TrainingDigits(options.n_distinct or 0, rule.mean, rule.std)

    def open_validation(self, options: LearningOptions, rule: InputRule) -> Source | None:
        return self.open(rule, options.n_validation, "validation") if options.n_validation else None

    def check_options(self, options: LearningOptions) -> None:
        n_distinct = options.n_distinct
        if n_distinct is None:
            raise ValueError(f"data of {self.name} needs n_distinct, the number of different images")
        if not isinstance(n_distinct, int) or isinstance(n_distinct, bool) or n_distinct < 1:
            raise ValueError(f"n_distinct {n_distinct!r}: expected a whole number of at least 1")
        if options.randaugment or options.erasing or options.validation or options.labels or options.share != 1:
            raise ValueError(
                f"randaugment, erasing, validation, labels and share are for folders of images, not for {self.name}"
            )


class Folder(NamedDataset):
    """A folder of image files with one subfolder per class."""

    has_splits, input_rule = False, None

    def __init__(self, root: str) -> None:
        self.name = root

    def open(
        self, rule: InputRule, n_images: int | None, split: Split = "test", labels: Sequence[str] | None = None
    ) -> Source:
        return FolderImages(Path(self.name), rule, n_images, labels)

    def open_training(self, options: LearningOptions, rule: InputRule, seed: int) -> TrainingImages:
        augment = augmentation(
            rule,
            randaugment=options.randaugment,
            erasing=options.erasing,
            min_crop=options.min_crop,
            flip=options.flip,
        )
        return AugmentedFolder(Path(self.name), augment, seed=seed, share=options.share, labels=_labels_of(options))

    def open_validation(self, options: LearningOptions, rule: InputRule) -> Source | None:
        if options.validation is None or not options.n_validation:
            return None
        return open_source(options.validation, rule, options.n_validation, "validation", _labels_of(options))

    def check_options(self, options: LearningOptions) -> None:
        if options.n_distinct is not None:
            raise ValueError(f"n_distinct {options.n_distinct!r}: it is for digits; for a folder give a share")


def _labels_of(options: LearningOptions) -> Sequence[str] | None:
    return None if options.labels is None else read_labels(Path(options.labels))


REFERENCE_DATASET = "digits"
DATASETS: dict[str, NamedDataset] = {REFERENCE_DATASET: ReferenceTask()}


def find_dataset(name: str) -> NamedDataset:
    """Return the dataset of that name; any other name is a folder."""
    return DATASETS.get(name) or Folder(name)


def open_source(
    data: str, rule: InputRule, n_images: int | None, split: Split = "test", labels: Sequence[str] | None = None
) -> Source:
    """Open a dataset by name. labels: of a model's outputs, for folders; see `FolderImages`.

    Raises: FileNotFoundError; ValueError where the labels are not those of the data.
    """
    dataset = find_dataset(data)
    if isinstance(dataset, Folder):
        return dataset.open(rule, n_images, split, labels)
    source = dataset.open(rule, n_images, split)
    if labels is not None and list(labels) != list(source.labels):
        raise ValueError(f"{data} has labels of its own, {shown(source.labels)}, not {shown(labels)}")
    return source


def run_data(recipe: Mapping[str, Any]) -> str:
    """Return the data on which a training run is measured: its own validation folder, or the digits.

    recipe: the run's recipe.json. Raises: ValueError where it has none.
    """
    data = recipe.get("data") or {}
    source = data.get("source", REFERENCE_DATASET)
    found = source if source in DATASETS else data.get("validation")
    if not found:
        raise ValueError(f"the run learned from {source} and has no validation folder: expected --data FOLDER")
    return str(found)


def published_data(manifest: Mapping[str, Any]) -> str:
    """Return the data on which a version is measured, where it is a dataset by name.

    Raises: ValueError where it is a folder.
    """
    name = manifest["training"]["dataset"]
    if name == DigitScenes.name:
        return REFERENCE_DATASET
    raise ValueError(f"the version was measured on {name}, whose folder it does not record: expected --data FOLDER")


def pixel_batches(source: Source, batch_size: int, n_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order. Shapes: uint8 (B, H, W, 3), (B,)"""
    yield from DataLoader(cast(Any, source), batch_size=batch_size, num_workers=n_workers)
