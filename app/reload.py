"""Reload: what is published into the store, or taken out of it, is served accordingly while requests go on."""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.catalogue import Catalogue, ServedModel
from app.errors import StoreError
from app.memory import return_freed_memory
from app.metrics import Metrics
from app.settings import Settings
from app.store import find_finished

logger = logging.getLogger(__name__)

LETTING_GO_SECONDS = 1.0  # until requests inside have let go of a version that was dropped

Version = tuple[str, int]  # the model's name, and a number
Signature = tuple[tuple[str, int, int], ...]  # of each file: name, time of its last change, bytes


@dataclass(frozen=True)
class Changes:
    """What the store asks for. A version that is served never changes: what lies there now is not what was verified."""

    load: list[Version]
    drop: list[Version]
    altered: list[Version]


def decide(
    lying: Mapping[Version, Signature], served: Mapping[Version, Signature], refused: Mapping[Version, Signature]
) -> Changes:
    """Compare what lies in the store with what is served, and with what was refused when it lay there as it did."""
    return Changes(
        load=sorted(v for v, signature in lying.items() if v not in served and refused.get(v) != signature),
        drop=sorted(v for v in served if v not in lying),
        altered=sorted(v for v, signature in served.items() if lying.get(v, signature) != signature),
    )


def choose_default(served: Collection[Version], wanted: str | None) -> str:
    return wanted or min(name for name, _ in served)


def keep_last(served: Collection[Version], gone: Collection[Version], default_model: str) -> Version | None:
    """Name the version that is served on although it is gone: the highest of the default model, if all are gone."""
    ours = [version for version in served if version[0] == default_model]
    return max(ours) if all(version in gone for version in ours) else None


def arrange(models: Iterable[ServedModel], wanted_default: str | None) -> Catalogue:
    """Make a catalogue, by the same rule for the default as when the store is loaded."""
    arranged: dict[str, dict[int, ServedModel]] = {}
    for model in models:
        arranged.setdefault(model.manifest.name, {})[int(model.manifest.version)] = model
    return Catalogue(arranged, wanted_default or min(arranged))


def scan(store: Path) -> dict[Version, Signature]:
    """List the finished versions, as cheaply as can be: nothing is opened.

    Raises: StoreError where the store cannot be read, FileNotFoundError where it changes meanwhile: then nothing is
    known, not even what is gone.
    """
    return {(folder.parent.name, int(folder.name)): _sign(folder) for folder in find_finished(store)}


def _sign(folder: Path) -> Signature:
    statuses = [(path.name, path.lstat()) for path in folder.iterdir()]
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in statuses))


class Reloader:
    """One thread that looks, loads one version after the other, and publishes a whole catalogue after each."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        catalogue: Catalogue,
        load: Callable[[Path], ServedModel],
        publish: Callable[[Catalogue], object],
    ) -> None:
        self._store, self._wanted_default = settings.model_store, settings.default_model
        self._seconds = settings.reload_seconds
        self._metrics, self._load, self._publish = metrics, load, publish
        self._models = {(m.manifest.name, int(m.manifest.version)): m for m in catalogue.all_models()}
        self._served: dict[Version, Signature] = {}
        self._refused: dict[Version, Signature] = {}
        self._kept: Version | None = None
        self._trouble = ""
        self._has_dropped = False
        self._wake, self._is_stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)

    @property
    def catalogue(self) -> Catalogue:
        return arrange(self._models.values(), self._wanted_default)

    def start(self) -> None:
        """Look now, and then from time to time; every `reload_seconds`, or not at all if that is 0."""
        self.look_soon()
        self._thread.start()

    def look_soon(self) -> None:
        self._wake.set()

    def stop(self, timeout_seconds: float) -> bool:
        """End after the version that is being loaded. Returns whether that was in time."""
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
                self.look()
            except Exception:
                logger.exception("looking at the model store failed; what is served stays")
            if self._has_dropped:
                self._is_stopping.wait(LETTING_GO_SECONDS)
                return_freed_memory()
                self._has_dropped = False

    def look(self) -> None:
        """Bring what is served in line with what lies in the store."""
        lying = self._scan()
        if lying is None:
            return
        served = {version: self._served.get(version, lying.get(version, ())) for version in self._models}
        self._refused = {version: state for version, state in self._refused.items() if version in lying}
        changes = decide(lying, served, self._refused)
        for name, number in changes.altered:
            logger.warning(
                "the files of %s version %d have changed, and are ignored: a version is immutable, publish a new one",
                name,
                number,
            )
        self._served = {version: lying.get(version, state) for version, state in served.items()}
        for version in changes.load:
            if self._is_stopping.is_set():
                return
            self._take(version, lying[version])
        self._drop(changes.drop)

    def _scan(self) -> dict[Version, Signature] | None:
        try:
            lying = scan(self._store)
        except FileNotFoundError:
            self.look_soon()  # it will hold still
            return None
        except (OSError, StoreError) as error:
            if str(error) != self._trouble:
                logger.error("the model store cannot be read, what is served stays: %s", error)
            self._trouble = str(error)
            return None
        self._trouble = ""
        return lying

    def _take(self, version: Version, signature: Signature) -> None:
        """Load a version and serve it, or remember that these files are not worth another try."""
        name, number = version
        try:
            self._models[version] = self._load(self._store / name / str(number))
        except (OSError, StoreError) as error:
            logger.error("refused %s version %d, until its files change: %s", name, number, error)
        except Exception:
            logger.exception("refused %s version %d, until its files change", name, number)
        if version not in self._models:
            self._refused[version] = signature
            self._metrics.count_reload("refused")
            return
        self._served[version] = signature
        self._publish(self.catalogue)
        self._metrics.count_reload("loaded")

    def _drop(self, gone: list[Version]) -> None:
        kept = keep_last(self._models, gone, choose_default(self._models, self._wanted_default))
        if kept is not None and kept != self._kept:
            logger.warning("%s version %d is gone, but served on: it is the last of the default model", *kept)
        self._kept = kept
        dropped = [version for version in gone if version != kept]
        for version in dropped:
            del self._models[version], self._served[version]
            logger.info("dropped %s version %d: its folder is gone", *version)
            self._metrics.count_reload("dropped")
        if dropped:
            self._publish(self.catalogue)
            self._has_dropped = True
