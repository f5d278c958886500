"""The folder of a run: files replaced atomically, checkpoints, and the log of every step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces the file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


def save_checkpoint(
    folder: Path, recipe: Any, state: Mapping[str, Any], artefacts: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write recipe.json, the artefacts and, last, state.pt, each atomically.

    recipe: a dataclass. artefacts: file name -> function that writes it
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Callable[[Path], Any]] = {
        "recipe.json": lambda file: file.write_text(json.dumps(asdict(recipe), indent=2)),
        **artefacts,
        "state.pt": lambda file: torch.save(state, file),
    }
    for name, write in contents.items():
        with replaced(folder / name) as file:
            write(file)


def saved_state(folder: Path, recipe: Any) -> dict[str, Any] | None:
    """Return the state of the last checkpoint, None where there is none.

    A setting that is newer than the checkpoint counts as its default.
    Raises: ValueError where the checkpoint is of another recipe.
    """
    if not (folder / "state.pt").exists():
        return None
    defaults = {field.name: field.default for field in fields(recipe) if field.default is not MISSING}
    found = {**defaults, **json.loads((folder / "recipe.json").read_text())}
    expected = json.loads(json.dumps(asdict(recipe)))
    differing = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}: give another folder"
        )
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    return state


class RunLog:
    """A log of figures by images seen, as JSON lines and in TensorBoard.

    Entries after the last checkpoint are dropped.
    """

    def __init__(self, folder: Path, n_seen: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            # The last line may be incomplete.
            with replaced(file) as new:
                new.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["n_seen"] <= n_seen))
        self._lines = file.open("a", buffering=1)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=n_seen + 1)

    def write(self, n_seen: int, figures: Mapping[str, float]) -> None:
        self._lines.write(json.dumps({"n_seen": n_seen, "time": time.time(), **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name.replace("_", "/", 1), value, n_seen)

    def flush(self) -> None:
        """Write buffered entries to disk, before a checkpoint that relies on them."""
        self._lines.flush()
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()
