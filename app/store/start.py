"""Start: load a whole store, and decide which model is the default."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import AwareDatetime, BaseModel

from app.backends import Backend
from app.errors import StoreError
from app.store.catalogue import Catalogue, Refusal, ServedModel
from app.store.files import read_manifest_file
from app.store.loader import StoreOptions, load_version
from app.store.manifest import MANIFEST_FILE
from app.store.refusals import ReloadResult, load_or_refuse, log_ignored
from app.store.scan import Scan, Version, folder_of, scan
from app.system.memory import return_freed_memory

logger = logging.getLogger(__name__)

UNKNOWN_AGE = (math.inf, math.inf)


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

    # Sorting reads every manifest, and is not needed if a name decides.
    names = sort_by_age(folder, found.versions) if options.default_model is None else list_models(found.versions)
    default_model = options.default_model or names[0]
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
    default_model = choose_default(folder, [name for name in names if name in models], refused, options.default_model)
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


def list_models(versions: Iterable[Version]) -> list[str]:
    return sorted({name for name, _ in versions})


def sort_by_age(folder: Path, versions: Iterable[Version]) -> list[str]:
    """Sort the models by when their first version was created: a publication now comes last."""
    ages: dict[str, tuple[float, float]] = {}
    for version in versions:
        ages[version[0]] = min(_age(folder_of(folder, version)), ages.get(version[0], UNKNOWN_AGE))
    return sorted(ages, key=lambda name: (ages[name], name))


def _age(folder: Path) -> tuple[float, float]:
    """Return when a version was created and, since copies say the same, when its manifest was written."""
    try:
        created = _Dated.model_validate_json(read_manifest_file(folder)).created
        return created.timestamp(), (folder / MANIFEST_FILE).stat().st_mtime
    except (StoreError, OSError, ValueError):
        # It will be refused.
        return UNKNOWN_AGE


class _Dated(BaseModel):
    created: AwareDatetime


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
    folder: Path, served: Sequence[str], refused: Mapping[Version, Refusal], configured: str | None
) -> str:
    """Return the model of requests that name none: the configured one, else the oldest.

    served: the models with a good version, the oldest first.
    Raises: StoreError.
    """
    if configured in served or (configured is None and served):
        return configured or served[0]
    bad = [version for version in refused if configured in (None, version[0])]
    if bad:
        raise StoreError(refused[bad[0]].file, refused[bad[0]].reason)
    names = ", ".join(sorted({*served, *(name for name, _ in refused)}))
    raise StoreError(folder, f"DTEM_DEFAULT_MODEL={configured}: no such model; accepted: {names}")
