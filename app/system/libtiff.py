"""libtiff: turns off its messages, which it prints to stderr, one for each broken row of an image."""

import contextlib
import ctypes
import re
from pathlib import Path

MAPS = Path("/proc/self/maps")
# Pillow's wheels have their own copy, with a digest in its name.
LIBRARY = re.compile(r"\s(/\S*/libtiff[^/\s]*\.so[^/\s]*)$", re.MULTILINE)


def silence_libtiff() -> None:
    """Drop the messages of every libtiff that is loaded. Errors are still returned to Pillow."""
    with contextlib.suppress(OSError, AttributeError):
        for path in set(LIBRARY.findall(MAPS.read_text(encoding="utf-8", errors="replace"))):
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
