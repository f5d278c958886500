"""Folders of images: one subfolder per class, and the labels that give the classes their indices."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")
"""What operating systems and tools leave beside the classes, besides names that start with a dot."""
_N_SHOWN = 5


class UnreadableImage(ValueError):  # noqa: N818
    """The message names the file and the reason, in one line."""

    def __init__(self, message: str) -> None:
        # PyTorch raises the error of a data worker again with the traceback before its message.
        super().__init__(" ".join(message.rpartition(f"{type(self).__name__}: ")[2].split()))


@dataclass(frozen=True)
class ClassFolders:
    """The images of each class, in sorted order. empty: the folders that have none, which are no classes."""

    root: Path
    images: Mapping[str, Sequence[Path]]
    empty: Sequence[str]

    @property
    def names(self) -> list[str]:
        return list(self.images)


def find_classes(root: Path) -> ClassFolders:
    """Find the images under `<root>/<class>/`, at any depth. Hidden and system folders are ignored.

    Raises: FileNotFoundError where the folder is missing, or no class has an image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a subfolder of images per class")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
    found = {name: _find_images(root / name) for name in names}
    images = {name: files for name, files in found.items() if files}
    if not images:
        raise FileNotFoundError(
            f"{root} has no subfolder with images; expected {root}/<class>/<image>, of {', '.join(EXTENSIONS)}"
        )
    return ClassFolders(root, images, [name for name in names if name not in images])


def _find_images(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        wanted = [name for name in files if not _is_hidden(name) and name.lower().endswith(EXTENSIONS)]
        found += [Path(parent, name) for name in wanted]
    return sorted(found, key=lambda file: (str(file.parent), file.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def match_labels(folders: ClassFolders, labels: Sequence[str]) -> dict[str, int]:
    """Return the index of each folder's class among the labels.

    A folder has the name of a label, or its first word (`n01440764 tench, Tinca tinca`). Of one
    label, the other of two folders is the negative class, with index 0.
    Raises: ValueError naming the folders that no label or several labels have.
    """
    if len(labels) == 1:
        return _match_one(folders, labels[0])
    found: dict[str, int] = {}
    unknown = []
    for name in folders.names:
        indices = [index for index, label in enumerate(labels) if label == name]
        indices = indices or [index for index, label in enumerate(labels) if label.split()[:1] == [name]]
        if len(indices) > 1:
            raise ValueError(f"folder {name} in {folders.root}: {len(indices)} labels have that name, {shown(labels)}")
        if indices:
            found[name] = indices[0]
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{folders.root} has folders that no label names: {shown(unknown)}; labels: {shown(labels)}")
    return found


def _match_one(folders: ClassFolders, label: str) -> dict[str, int]:
    if len(folders.names) != 2 or label not in folders.names:
        raise ValueError(
            f"{folders.root} has the folders {shown(folders.names)}; for the one label {label!r}, expected two: that "
            "name, and the negative class"
        )
    return {name: int(name == label) for name in folders.names}


def read_labels(path: Path) -> tuple[str, ...]:
    """Read labels in the order of a model's outputs.

    A text file has one per line. A JSON file is a list, {index: name}, {index: [synset, name]}, or
    a model's config.json with id2label, or with label_names.
    Raises: ValueError naming what is wrong; OSError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is no UTF-8 text; expected one label per line, or JSON") from err
    labels = _from_json(path, text) if text.lstrip()[:1] in ("[", "{") else [line.strip() for line in text.splitlines()]
    while labels and not labels[-1]:
        labels.pop()
    if not labels:
        raise ValueError(f"{path} has no labels; expected one per line, or JSON")
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{path}: label {index} is {label!r}; expected a name")
    return tuple(labels)


def _from_json(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is no JSON: {err}") from err
    if isinstance(found, dict):
        found = found.get("id2label") or found.get("label_names") or found
    if isinstance(found, list):
        return found
    expected = [str(index) for index in range(len(found))]
    if sorted(found) != sorted(expected):
        example = next((key for key in found if key not in expected), None)
        raise ValueError(f"{path}: key {example!r}; expected the indices 0 … {len(found) - 1}, or a list")
    names = [found[index] for index in expected]
    return [" ".join(name) if isinstance(name, list) else name for name in names]


def shown(names: Sequence[str]) -> str:
    """List the first names, for a message."""
    more = f", … ({len(names)} in all)" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more
