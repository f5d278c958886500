"""Progress: one line of at most 80 columns on a terminal, one plain line for each title elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
COLUMNS = 80


def progress(items: Iterable[T], title: str, total: int, unit: str = "batch") -> Iterator[T]:
    """Yield the items, and show how many of them are done."""
    if not sys.stderr.isatty():
        print(f"{title}: {total} {unit}{'' if total == 1 else 'es' if unit == 'batch' else 's'}", file=sys.stderr)
        yield from items
        return
    yield from tqdm(items, desc=title, total=total, unit=unit, ncols=COLUMNS)
