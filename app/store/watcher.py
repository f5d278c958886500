"""Watcher: load new model versions and drop removed ones while the service runs."""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.errors import StoreError
from app.settings import Settings
from app.store.catalogue import Catalogue, ServedModel
from app.store.loader import choose_default, find_finished
from app.system.memory import return_freed_memory

logger = logging.getLogger(__name__)

# Time for requests in flight to release a dropped version.
RELEASE_SECONDS = 1.0

# Model name and version number.
Version = tuple[str, int]
# Name, modification time and size of each file.
Signature = tuple[tuple[str, int, int], ...]
ReloadResult = Literal["loaded", "refused", "dropped"]


@dataclass(frozen=True)
class Changes:
    """Differences between the store and the catalogue. altered: served versions whose files changed; not reloaded."""

    load: list[Version]
    drop: list[Version]
    altered: list[Version]


def compare(
    found: Mapping[Version, Signature], served: Mapping[Version, Signature], refused: Mapping[Version, Signature]
) -> Changes:
    """Compare the versions in the store with those served. A refused version is loaded only if its files changed."""
    return Changes(
        load=sorted(v for v, signature in found.items() if v not in served and refused.get(v) != signature),
        drop=sorted(v for v in served if v not in found),
        altered=sorted(v for v, signature in served.items() if found.get(v, signature) != signature),
    )


def keep_last(served: Collection[Version], gone: Collection[Version], default_model: str) -> Version | None:
    """Return the highest version of the default model if all its versions are gone, to keep serving it."""
    ours = [version for version in served if version[0] == default_model]
    return max(ours) if all(version in gone for version in ours) else None


def make_catalogue(models: Iterable[ServedModel], configured_default: str | None) -> Catalogue:
    """Make a catalogue; its default model follows the same rule as at start-up."""
    versions: dict[str, dict[int, ServedModel]] = {}
    for model in models:
        versions.setdefault(model.manifest.name, {})[int(model.manifest.version)] = model
    return Catalogue(versions, choose_default(versions, configured_default))


def scan(store: Path) -> dict[Version, Signature]:
    """List the finished versions without opening a file.

    Raises: StoreError if the store cannot be read; FileNotFoundError if it changes during the scan.
    """
    return {(folder.parent.name, int(folder.name)): _sign(folder) for folder in find_finished(store)}


def _sign(folder: Path) -> Signature:
    statuses = [(path.name, path.lstat()) for path in folder.iterdir()]
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in statuses))


class Watcher:
    """A thread that scans the store, loads one version at a time, and publishes a new catalogue after each."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        load: Callable[[Path], ServedModel],
        publish: Callable[[Catalogue], object],
        count: Callable[[ReloadResult], object],
    ) -> None:
        self._store, self._configured_default = settings.model_store, settings.default_model
        self._seconds = settings.reload_seconds
        self._load, self._publish, self._count = load, publish, count
        self._models = {(m.manifest.name, int(m.manifest.version)): m for m in catalogue.all_models()}
        self._served: dict[Version, Signature] = {}
        self._refused: dict[Version, Signature] = {}
        self._kept: Version | None = None
        self._last_error = ""
        self._has_dropped = False
        self._wake, self._is_stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    @property
    def catalogue(self) -> Catalogue:
        return make_catalogue(self._models.values(), self._configured_default)

    def start(self) -> None:
        """Scan now, and then every `reload_seconds`; if that is 0, only after `scan_soon`."""
        self.scan_soon()
        self._thread.start()

    def scan_soon(self) -> None:
        self._wake.set()

    def stop(self, timeout_seconds: float) -> bool:
        """Stop after the version being loaded. Returns whether the thread ended within the timeout."""
        self._is_stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds or None)
            self._wake.clear()
            if self._is_stopping.is_set():
                return
            try:
                self.update()
            except Exception:
                logger.exception("model store scan failed; still serving the loaded versions")
            if self._has_dropped:
                self._is_stopping.wait(RELEASE_SECONDS)
                return_freed_memory()
                self._has_dropped = False

    def update(self) -> None:
        """Scan the store, and load and drop versions accordingly."""
        found = self._scan()
        if found is None:
            return
        served = {version: self._served.get(version, found.get(version, ())) for version in self._models}
        self._refused = {version: state for version, state in self._refused.items() if version in found}
        changes = compare(found, served, self._refused)
        for name, number in changes.altered:
            logger.warning(
                "ignored changed files of %s version %d: versions are immutable, publish a new one",
                name,
                number,
            )
        self._served = {version: found.get(version, state) for version, state in served.items()}
        for version in changes.load:
            if self._is_stopping.is_set():
                return
            self._load_and_publish(version, found[version])
        self._drop(changes.drop)

    def _scan(self) -> dict[Version, Signature] | None:
        try:
            found = scan(self._store)
        except FileNotFoundError:
            # The store changed during the scan; retry at once.
            self.scan_soon()
            return None
        except (OSError, StoreError) as error:
            if str(error) != self._last_error:
                logger.error("cannot read the model store; still serving the loaded versions: %s", error)
            self._last_error = str(error)
            return None
        self._last_error = ""
        return found

    def _load_and_publish(self, version: Version, signature: Signature) -> None:
        """Load and publish a version. A refused version is retried once its files change."""
        name, number = version
        try:
            self._models[version] = self._load(self._store / name / str(number))
        except (OSError, StoreError) as error:
            logger.error("refused %s version %d until its files change: %s", name, number, error)
        except Exception:
            logger.exception("refused %s version %d until its files change", name, number)
        if version not in self._models:
            self._refused[version] = signature
            self._count("refused")
            return
        self._served[version] = signature
        self._publish(self.catalogue)
        self._count("loaded")

    def _drop(self, gone: list[Version]) -> None:
        default = choose_default({name for name, _ in self._models}, self._configured_default)
        kept = keep_last(self._models, gone, default)
        if kept is not None and kept != self._kept:
            logger.warning(
                "still serving %s version %d, whose folder is gone: it is the last of the default model", *kept
            )
        self._kept = kept
        dropped = [version for version in gone if version != kept]
        for version in dropped:
            del self._models[version], self._served[version]
            logger.info("dropped %s version %d: its folder is gone", *version)
            self._count("dropped")
        if dropped:
            self._publish(self.catalogue)
            self._has_dropped = True
