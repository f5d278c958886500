"""Progress of a run: a bar of at most 80 columns on a terminal, a line per checkpoint elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from training.evaluate.progress import COLUMNS


class StepProgress:
    """Units: n_images and n_seen of the whole run, in images."""

    def __init__(self, n_images: int, n_seen: int, *, is_shown: bool = True) -> None:
        is_terminal = sys.stderr.isatty()
        self._has_lines = is_shown and not is_terminal
        self._bar = tqdm(
            total=n_images,
            initial=n_seen,
            unit="image",
            smoothing=0.05,
            ncols=COLUMNS,
            disable=not (is_shown and is_terminal),
        )
        self._n_images, self._n_seen, self._text = n_images, n_seen, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def advance(self, n_images: int, text: str) -> None:
        self._n_seen, self._text = self._n_seen + n_images, text
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(n_images)

    def checkpoint(self) -> None:
        """Say off a terminal how far the run is."""
        if self._has_lines:
            print(f"image {self._n_seen:,} of {self._n_images:,}: {self._text}", file=sys.stderr, flush=True)
