"""Start: load a whole store, and decide which model is the default."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from app.backends import Backend
from app.errors import StoreError
from app.store.catalogue import Catalogue, Refusal, ServedModel
from app.store.loader import StoreOptions, load_version
from app.store.manifest import MANIFEST_FILE
from app.store.refusals import ReloadResult, load_or_refuse, log_ignored
from app.store.scan import Scan, Version, scan
from app.system.memory import return_freed_memory

logger = logging.getLogger(__name__)


def load_catalogue(
    folder: Path, backend: Backend, options: StoreOptions, count: Callable[[ReloadResult], object] = lambda result: None
) -> Catalogue:
    """Load every good version of every model. The others are logged, counted and refused, as at a reload.

    Raises: StoreError if the store cannot be read, or if there is no default model with a good version.
    """
    found = scan_at_start(folder)
    models: dict[str, dict[int, ServedModel]] = {}
    refused: dict[Version, Refusal] = {}

    def attempt(version: Version, options: StoreOptions) -> None:
        loaded = load_or_refuse(
            folder, version, found.versions[version], lambda path: load_version(path, backend, options)
        )
        if isinstance(loaded, Refusal):
            refused[version] = loaded
            count("refused")
        else:
            refused.pop(version, None)
            models.setdefault(version[0], {})[version[1]] = loaded

    default_model = options.default_model or sole_model(found.versions)
    for name, versions in group_for_start(found.versions, default_model).items():
        for version in versions:
            attempt(version, options)
        too_large = find_too_large(versions, refused)
        if name == default_model and name not in models and too_large is not None:
            logger.warning("loading %s version %d all the same: the default model has no smaller one", *too_large)
            attempt(too_large, replace(options, memory=None))
    if refused:
        # What was loaded of them before they failed.
        return_freed_memory()
    default_model = choose_default(folder, models, refused, options.default_model)
    return Catalogue(models, default_model, refused, found.ignored)


def scan_at_start(folder: Path) -> Scan:
    """Raises: StoreError."""
    try:
        found = scan(folder)
    except FileNotFoundError as error:
        raise StoreError(error.filename or folder, error.strerror or str(error)) from error
    log_ignored(folder, found.ignored, {})
    if not found.versions:
        raise StoreError(folder, f"no models found (expected <model>/<version>/{MANIFEST_FILE})")
    return found


def sole_model(versions: Iterable[Version]) -> str | None:
    """Return the name of the only model, or None if there are several."""
    names = {name for name, _ in versions}
    return next(iter(names)) if len(names) == 1 else None


def group_for_start(versions: Iterable[Version], default_model: str | None) -> dict[str, list[Version]]:
    """Group versions by model, in the order in which they get memory: the default model and high versions first."""
    groups: dict[str, list[Version]] = {}
    for version in sorted(versions, key=lambda version: (version[0] != default_model, version[0], -version[1])):
        groups.setdefault(version[0], []).append(version)
    return groups


def find_too_large(versions: Iterable[Version], refused: Mapping[Version, Refusal]) -> Version | None:
    """Return the first version that was refused only for want of memory."""
    return next((version for version in versions if version in refused and refused[version].is_too_large), None)


def choose_default(
    folder: Path, served: Collection[str], refused: Mapping[Version, Refusal], configured: str | None
) -> str:
    """Return the model of requests that name none: the configured one, else the only one that can be served.

    Nothing else decides, such as names or dates: a model published later would change what clients get.
    Raises: StoreError.
    """
    # A model without a good version is no choice. One that does not fit into memory is: at another start it may.
    choices = {*served, *(version[0] for version, refusal in refused.items() if refusal.is_too_large)}
    if configured in served or (configured is None and len(choices) == len(served) == 1):
        return configured or next(iter(served))
    if configured is None and len(choices) > 1:
        names = ", ".join(sorted(choices))
        reason = f"DTEM_DEFAULT_MODEL is not set, and there are {len(choices)} models; accepted: {names}"
        raise StoreError(folder, reason)
    bad = [version for version in refused if configured in (None, version[0])]
    if bad:
        raise StoreError(refused[bad[0]].file, refused[bad[0]].reason)
    names = ", ".join(sorted({*served, *(name for name, _ in refused)}))
    raise StoreError(folder, f"DTEM_DEFAULT_MODEL={configured}: no such model; accepted: {names}")
