"""The folder of a run: files that are whole whenever another process reads them, and the log of every step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; what is there at the end takes the file's place at once."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


class RunLog:
    """Figures by images seen, as JSON lines and to TensorBoard; what was written after the checkpoint is dropped."""

    def __init__(self, folder: Path, n_seen: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            with replaced(file) as new:  # the last line may be half written
                new.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["n_seen"] <= n_seen))
        self._lines = file.open("a", buffering=1)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=n_seen + 1)

    def write(self, n_seen: int, figures: Mapping[str, float]) -> None:
        self._lines.write(json.dumps({"n_seen": n_seen, "time": time.time(), **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name.replace("_", "/", 1), value, n_seen)

    def flush(self) -> None:
        """Let nothing be lost that a checkpoint written next will count as logged."""
        self._lines.flush()
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()
