"""Scan: which versions a store has, without opening a file."""

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import StoreError
from app.store.files import list_entries
from app.store.manifest import MANIFEST_FILE

MODEL_FOLDER = re.compile(r"[a-z0-9][a-z0-9._-]*")
VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,8}")

# Model name and version number.
Version = tuple[str, int]
# Name, modification time and size of each file.
Signature = tuple[tuple[str, int, int], ...]
# Of a version whose folder cannot be read.
UNREADABLE: Signature = (("", 0, 0),)


@dataclass(frozen=True)
class Scan:
    """What a store contains.

    versions: the finished versions, also those that turn out to be bad.
    ignored: other folders, with the reason; names that begin with a dot are temporary and not listed.
    unreadable: models whose folder cannot be read at present, so that nothing is known about their versions.
    """

    versions: dict[Version, Signature] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)


def scan(store: Path) -> Scan:
    """List the versions with a manifest, which is written last.

    Raises: StoreError if the store itself cannot be read; FileNotFoundError if it changes during the scan.
    """
    found = Scan()
    for model in _list_models(store):
        if not MODEL_FOLDER.fullmatch(model.name):
            _note_misnamed_model(model, found)
            continue
        try:
            _scan_model(model, found)
        except FileNotFoundError:
            raise
        except OSError as error:
            found.unreadable.add(model.name)
            found.ignored[model.name] = f"cannot be read: {error.strerror or error}"
    return found


def folder_of(store: Path, version: Version) -> Path:
    return store / version[0] / str(version[1])


def _list_models(store: Path) -> list[Path]:
    try:
        if not store.is_dir():
            raise StoreError(store, "is not a folder")
        return [path for path in list_entries(store) if not path.name.startswith(".") and path.is_dir()]
    except OSError as error:
        raise StoreError(error.filename or store, error.strerror or str(error)) from error


def _note_misnamed_model(model: Path, found: Scan) -> None:
    """A volume has other folders too, such as lost+found: note only one that contains versions."""
    with contextlib.suppress(OSError):
        if any(model.glob(f"*/{MANIFEST_FILE}")):
            found.ignored[model.name] = f"not a model's name; accepted: {MODEL_FOLDER.pattern}"


def _scan_model(model: Path, found: Scan) -> None:
    """Raises: OSError."""
    for entry in list_entries(model):
        name = f"{model.name}/{entry.name}"
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if not VERSION_FOLDER.fullmatch(entry.name):
            found.ignored[name] = f"not a version number; accepted: {VERSION_FOLDER.pattern}"
            continue
        signature = _sign(entry)
        if signature != UNREADABLE and MANIFEST_FILE not in {file for file, _, _ in signature}:
            found.ignored[name] = f"not finished: it has no {MANIFEST_FILE}"
            continue
        found.versions[model.name, int(entry.name)] = signature


def _sign(folder: Path) -> Signature:
    """Raises: FileNotFoundError."""
    try:
        return tuple(_sign_file(path) for path in list_entries(folder))
    except FileNotFoundError:
        raise
    except OSError:
        return UNREADABLE


def _sign_file(path: Path) -> tuple[str, int, int]:
    status = path.lstat()
    if path.is_symlink():
        # A link that leads nowhere is described by itself.
        with contextlib.suppress(OSError):
            status = path.stat()
    return path.name, status.st_mtime_ns, status.st_size
