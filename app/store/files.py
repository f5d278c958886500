"""Files: what a version folder may contain, and how its files are opened and verified."""

import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from app.errors import StoreError, TemporaryStoreError
from app.store.manifest import MANIFEST_FILE, Manifest

# A manifest has some kB per variant. The bound keeps a file of another kind out of memory.
MAX_MANIFEST_BYTES = 32_000_000
# Written by network file systems, macOS and vim, not by a publisher. The service never opens them.
LEFTOVER = re.compile(r"\.nfs[0-9a-fA-F]+|\.fuse_hidden[0-9a-fA-F]+|\.DS_Store|\._.+|\..+\.sw[a-p]")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def list_entries(folder: Path) -> list[Path]:
    """List what is in a folder, without leftovers.

    Raises: OSError.
    """
    return sorted(path for path in folder.iterdir() if not LEFTOVER.fullmatch(path.name))


def read_manifest_file(folder: Path) -> bytes:
    """Raises: StoreError."""
    path = folder / MANIFEST_FILE
    try:
        with open_regular(path) as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise _cannot_read(path, error) from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise StoreError(path, f"has more than {MAX_MANIFEST_BYTES} bytes")
    return content


def verify_files(folder: Path, manifest: Manifest, n_threads: int) -> None:
    """Check that the folder contains exactly the files of the manifest, with the same digests.

    Raises: StoreError.
    """
    try:
        present = {path.name for path in list_entries(folder)} - {MANIFEST_FILE}
    except OSError as error:
        raise _cannot_read(folder, error) from error
    unlisted = sorted(present - set(manifest.files))
    if unlisted:
        raise StoreError(folder / unlisted[0], f"is not listed in {MANIFEST_FILE}")
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda name: _verify_file(folder, name, manifest), sorted(manifest.files)))


def _verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    path, expected = folder / name, manifest.files[name]
    try:
        with open_regular(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            # Before the digest, which takes seconds per GB.
            if n_bytes != expected.bytes:
                raise StoreError(path, f"has {n_bytes} bytes, expected {expected.bytes}")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _cannot_read(path, error) from error
    if digest != expected.sha256:
        raise StoreError(path, f"SHA-256 is {digest}, expected {expected.sha256}")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file of a version for reading, without blocking. Links may lead to other folders of the store.

    Raises: OSError; StoreError for a FIFO, socket, device or folder, and for a link out of the store.
    """
    # Before opening too: opening a device can have an effect.
    _require_regular(path, path.stat())
    _require_inside(path)
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()))
    except StoreError:
        file.close()
        raise
    return file


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise StoreError(path, f"is {kind}, expected a regular file")


def _require_inside(path: Path) -> None:
    """Check where the links of <store>/<model>/<version>/<file> lead. The version folder itself may be elsewhere."""
    folder, store = path.parent, path.parents[2]
    target = path.resolve()
    if not any(target.is_relative_to(root.resolve()) for root in (folder, store)):
        raise StoreError(path, f"is a link to {target}, outside the model store")


def _cannot_read(path: Path, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    # A missing file stays missing; other errors, such as of permissions or the network, can pass.
    kind = StoreError if isinstance(error, FileNotFoundError) else TemporaryStoreError
    return kind(path, reason)
