"""Stderr: keeps the process's stderr for our log. What libraries print to it becomes a bounded number of records.

C libraries write to file descriptor 2, past any logging: two images of 2 kB could print 50 MB.
"""

import contextlib
import faulthandler
import fcntl
import logging
import os
import select
import sys
import threading
import time

from app.observability.logs import with_fields

STDERR = 2
PIPE_BYTES, READ_BYTES = 1 << 20, 1 << 16
MAX_TEXT_BYTES = 500
# After a record, one more for all that is printed in this time.
INTERVAL_SECONDS = 10.0
# Lets a library finish its message, and fill the pipe rather than wake this thread for each line.
PAUSE_SECONDS = 0.02

logger = logging.getLogger(__name__)


def divert_stderr() -> None:
    """Give the real stderr to Python alone, and read in a thread what libraries print.

    Tracebacks of a crash go to the real one too; they are written without Python. So does everything if Python is
    asked to print what it imports.
    """
    if sys.flags.verbose or "importtime" in sys._xoptions:
        return
    sys.stderr.flush()
    real = os.dup(STDERR)
    sys.stderr = os.fdopen(real, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    reading_end, writing_end = os.pipe()
    # A full pipe drops what is printed; it never blocks the thread of a library.
    os.set_blocking(writing_end, False)
    # The system may allow less.
    with contextlib.suppress(OSError):
        fcntl.fcntl(writing_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.dup2(writing_end, STDERR)
    os.close(writing_end)
    threading.Thread(target=_read_on, args=(reading_end,), name="stderr", daemon=True).start()


def _read_on(pipe: int) -> None:
    while True:
        _log(*_read(pipe, None))
        until = time.monotonic() + INTERVAL_SECONDS
        text, n_bytes = b"", 0
        while (seconds := until - time.monotonic()) > 0:
            more, n_more = _read(pipe, seconds)
            text, n_bytes = text or more, n_bytes + n_more
        if n_bytes:
            _log(text, n_bytes)


def _read(pipe: int, seconds: float | None) -> tuple[bytes, int]:
    """Wait for text, and for its rest. Returns its beginning, and its size; nothing after the time."""
    if not select.select([pipe], [], [], seconds)[0]:
        return b"", 0
    time.sleep(PAUSE_SECONDS)
    text = os.read(pipe, READ_BYTES)
    return text[:MAX_TEXT_BYTES], len(text)


def _log(text: bytes, n_bytes: int) -> None:
    shown = text.decode("utf-8", "replace").strip()
    logger.warning("a library printed to stderr", extra=with_fields(text=shown, n_bytes=n_bytes))
