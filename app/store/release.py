"""Release: return the memory of dropped versions once no request in flight uses them."""

import logging
import threading
import weakref
from collections.abc import Collection

from app.backends import Runner
from app.system.memory import return_freed_memory

logger = logging.getLogger(__name__)

# Longer than any request in flight. Each try collects garbage, which pauses the event loop, so later ones are rarer.
WAITS_SECONDS = (1, 1, 2, 4, 8, 16, 32, 64)


def return_when_released(
    dropped: Collection[weakref.ref[Runner]],
    is_stopping: threading.Event,
    waits_seconds: Collection[float] = WAITS_SECONDS,
) -> None:
    """Return freed memory to the system after each wait, until the dropped runners are gone or the service stops."""
    for seconds in waits_seconds:
        if is_stopping.wait(seconds):
            return
        # Checked first: what is released after the call below needs another one.
        is_released = all(reference() is None for reference in dropped)
        return_freed_memory()
        if is_released:
            return
    n_kept = sum(reference() is not None for reference in dropped)
    logger.warning("dropped graphs still in memory after %d s: %d", sum(waits_seconds), n_kept)
