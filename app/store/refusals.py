"""Refusals: load a version; a bad one is logged and refused, whatever is wrong with it."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from app.errors import NotEnoughMemory, StoreError, TemporaryStoreError
from app.store.catalogue import Refusal, ServedModel
from app.store.scan import Signature, Version, folder_of

logger = logging.getLogger(__name__)

# The service tries again after this time if the reason can pass without a change of the files.
RETRY_SECONDS = 30.0

ReloadResult = Literal["loaded", "refused", "dropped"]
Load = Callable[[Path], ServedModel]


def load_or_refuse(
    store: Path, version: Version, signature: Signature, load: Load, previous: Refusal | None = None
) -> ServedModel | Refusal:
    """Load a version, or log why not. A retry that fails for the same reason is not logged again."""
    folder = folder_of(store, version)
    try:
        return load(folder)
    except StoreError as error:
        can_pass = isinstance(error, TemporaryStoreError)
        retry_at = time.monotonic() + RETRY_SECONDS if can_pass else None
        if previous is None or previous.reason != error.reason:
            until = "for now" if can_pass else "until its files change"
            logger.error("refused %s version %d %s: %s", *version, until, error)
        return Refusal(signature, error.file, error.reason, retry_at, isinstance(error, NotEnoughMemory))
    except Exception as error:
        # Whatever it breaks, a bad version must not stop the good ones.
        logger.exception("refused %s version %d until its files change", *version)
        return Refusal(signature, str(folder), f"{type(error).__name__}; the service log has the details")


def log_ignored(store: Path, ignored: Mapping[str, str], logged: Mapping[str, str]) -> None:
    """Log the ignored folders that were not logged before, so that each is logged once and not at each scan."""
    for name, reason in ignored.items():
        if logged.get(name) != reason:
            logger.warning("ignored folder %s: %s", store / name, reason)
