"""Watcher: load new model versions and drop removed ones while the service runs."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from app.backends import Runner
from app.errors import StoreError
from app.settings import Settings
from app.store.catalogue import Catalogue, Refusal, ServedModel
from app.store.refusals import Load, ReloadResult, load_or_refuse, log_ignored
from app.store.release import return_when_released
from app.store.scan import Scan, Signature, Version, scan

logger = logging.getLogger(__name__)


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


def index_models(models: Iterable[ServedModel]) -> dict[str, dict[int, ServedModel]]:
    """Index models by name, then by version."""
    versions: dict[str, dict[int, ServedModel]] = {}
    for model in models:
        versions.setdefault(model.manifest.name, {})[int(model.manifest.version)] = model
    return versions


def include_unreadable(found: Scan, served: Mapping[Version, Signature]) -> dict[Version, Signature]:
    """Add to the versions found those served of a model whose folder cannot be read: they may still be there."""
    return found.versions | {version: state for version, state in served.items() if version[0] in found.unreadable}


class Watcher:
    """A thread that scans the store, loads one version at a time, and publishes a new catalogue after each."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        load: Load,
        publish: Callable[[Catalogue], object],
        count: Callable[[ReloadResult], object],
    ) -> None:
        self._store, self._seconds = settings.model_store, settings.reload_seconds
        self._is_default_configured = settings.default_model is not None
        self._load, self._publish, self._count = load, publish, count
        # Fixed at start: a publication never changes what clients get that name no model.
        self._default_model = catalogue.default_model
        self._models = {(m.manifest.name, int(m.manifest.version)): m for m in catalogue.all_models()}
        self._served: dict[Version, Signature] = {}
        self._refused, self._ignored = dict(catalogue.refused), dict(catalogue.ignored)
        self._kept: Version | None = None
        self._last_error = ""
        self._has_freed = False
        self._dropped: list[weakref.ref[Runner]] = []
        self._wake, self._is_stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    @property
    def catalogue(self) -> Catalogue:
        models = index_models(self._models.values())
        return Catalogue(models, self._default_model, dict(self._refused), dict(self._ignored))

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
            if self._has_freed:
                self._return_memory()

    def _return_memory(self) -> None:
        dropped, self._dropped, self._has_freed = self._dropped, [], False
        # A thread of its own: requests in flight may take longer than the next scan can wait.
        threading.Thread(
            target=return_when_released, args=(dropped, self._is_stopping), name="release", daemon=True
        ).start()

    def update(self) -> None:
        """Scan the store, and load and drop versions accordingly."""
        scanned = self._scan()
        if scanned is None:
            return
        served = {version: self._served.get(version, scanned.versions.get(version, ())) for version in self._models}
        found = include_unreadable(scanned, served)
        self._forget(found, scanned.ignored)
        changes = compare(found, served, self._list_final())
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

    def _forget(self, found: Mapping[Version, Signature], ignored: Mapping[str, str]) -> None:
        """Forget refused versions and ignored folders that are gone."""
        log_ignored(self._store, ignored, self._ignored)
        refused = {version: refusal for version, refusal in self._refused.items() if version in found}
        has_changed = (refused, ignored) != (self._refused, self._ignored)
        self._refused, self._ignored = refused, dict(ignored)
        if has_changed:
            self._publish(self.catalogue)

    def _list_final(self) -> dict[Version, Signature]:
        """List the refused versions that are not to be tried again yet."""
        now = time.monotonic()
        is_due = {v for v, refusal in self._refused.items() if refusal.retry_at is not None and refusal.retry_at <= now}
        return {version: refusal.signature for version, refusal in self._refused.items() if version not in is_due}

    def _scan(self) -> Scan | None:
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
        """Load a version and publish it, or publish that it is refused."""
        previous = self._refused.pop(version, None)
        loaded = load_or_refuse(self._store, version, signature, self._load, previous)
        if isinstance(loaded, Refusal):
            self._refused[version] = loaded
            if previous is None or previous.reason != loaded.reason or previous.signature != signature:
                self._count("refused")
            self._has_freed = True
        else:
            self._warn_of_second_model(version[0])
            self._models[version], self._served[version] = loaded, signature
            self._count("loaded")
        self._publish(self.catalogue)

    def _warn_of_second_model(self, name: str) -> None:
        if self._is_default_configured or name in {served for served, _ in self._models}:
            return
        logger.warning(
            "the default model stays %s; set DTEM_DEFAULT_MODEL, since %s is another model",
            self._default_model,
            name,
        )

    def _drop(self, gone: list[Version]) -> None:
        kept = keep_last(self._models, gone, self._default_model)
        if kept is not None and kept != self._kept:
            logger.warning(
                "still serving %s version %d, whose folder is gone: it is the last of the default model", *kept
            )
        self._kept = kept
        dropped = [version for version in gone if version != kept]
        for version in dropped:
            variants = self._models.pop(version).variants.values()
            self._dropped += [weakref.ref(variant.runner) for variant in variants]
            del self._served[version]
            logger.info("dropped %s version %d: its folder is gone", *version)
            self._count("dropped")
        if dropped:
            self._publish(self.catalogue)
            self._has_freed = True
