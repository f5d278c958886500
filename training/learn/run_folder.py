"""The folder of a run: files replaced atomically, checkpoints, and the log of every step."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import scalar

METRICS = "metrics.jsonl"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces the file atomically.

    The file's mode follows the umask, whatever the writer chose. Nothing is left where it fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def opened_folder(folder: Path, checkpoint_bytes: int) -> Iterator[None]:
    """Create the folder, and reserve it for this run.

    Raises: OSError where another run uses it, or it cannot hold a checkpoint of that size.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, checkpoint_bytes)
    except OSError as err:
        raise OSError(
            f"{folder} cannot hold a checkpoint of {checkpoint_bytes / 1e6:.1f} MB: {err.strerror}; "
            "expected a writable folder with that much space"
        ) from err
    with (folder / ".lock").open("a") as lock:
        try:
            # Data workers do not inherit this kind of lock, so those of a killed run cannot hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise OSError(f"{folder} is in use by another run: wait for its end, or give another folder") from err
        yield


def _check_space(folder: Path, n_bytes: int) -> None:
    probe = folder / "space.tmp"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    finally:
        with suppress(OSError):
            probe.unlink()


def save_checkpoint(
    folder: Path, recipe: Any, state: Mapping[str, Any], artefacts: Mapping[str, Callable[[Path], Any]]
) -> None:
    """Write state.pt, recipe.json and the artefacts, then replace the previous ones, state.pt last.

    recipe: a dataclass. artefacts: file name -> function that writes it
    Raises: OSError naming the file that cannot be written; the previous checkpoint is then whole.
    """
    contents: dict[str, Callable[[Path], Any]] = {
        "state.pt": lambda file: _save_state(state, file),
        "recipe.json": lambda file: file.write_text(json.dumps(asdict(recipe), indent=2)),
        **artefacts,
    }
    name = ""
    try:
        # Files are replaced in the reverse of this order, once all are written.
        with ExitStack() as files:
            for name, write in contents.items():
                write(files.enter_context(replaced(folder / name)))
    except (OSError, RuntimeError, SafetensorError) as err:
        reason = err.__context__ if isinstance(err.__context__, OSError) else err
        raise OSError(f"{folder / name} cannot be written, and the last checkpoint stays: {reason}") from err


def _save_state(state: Mapping[str, Any], file: Path) -> None:
    # A path instead of an open file would hide why writing failed.
    with file.open("wb") as opened:
        torch.save(state, opened)


def saved_state(folder: Path, recipe: Any) -> dict[str, Any] | None:
    """Return the state of the last checkpoint, None where there is none.

    A setting that is newer than the checkpoint counts as its default.
    Raises: ValueError where the checkpoint is of another recipe, or state.pt is damaged.
    """
    if not (folder / "state.pt").exists():
        return None
    found = _as_json(_with_defaults(json.loads((folder / "recipe.json").read_text()), recipe))
    expected = _as_json(asdict(recipe))
    differing = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}: give another folder"
        )
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as err:
        raise ValueError(f"{folder / 'state.pt'} is damaged; delete it to begin the run anew") from err
    return state


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    return copy


def _with_defaults(found: dict[str, Any], part: Any) -> dict[str, Any]:
    """Fill settings that are missing, at any depth, with the defaults of the dataclass `part`."""
    filled = dict(found)
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name not in found and field.default is not MISSING:
            filled[field.name] = field.default
        elif is_dataclass(value) and isinstance(found.get(field.name), dict):
            filled[field.name] = _with_defaults(found[field.name], value)
    return filled


class RunLog:
    """A log of figures by images seen, as JSON lines and in TensorBoard.

    Entries after the last checkpoint are dropped.
    """

    def __init__(self, folder: Path, n_seen: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / METRICS
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            # The last line may be incomplete.
            with replaced(file) as new:
                new.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["n_seen"] <= n_seen))
        self._file = file
        self._lines = file.open("a", buffering=1)
        self._board = _board(folder / "tensorboard", purge_step=n_seen + 1)

    def write(self, n_seen: int, figures: Mapping[str, float]) -> None:
        """Raises: OSError naming the file that cannot be written."""
        now = time.time()
        try:
            self._lines.write(json.dumps({"n_seen": n_seen, "time": now, **figures}) + "\n")
            for name, value in figures.items():
                summary = scalar(name.replace("_", "/", 1), value)  # type: ignore[no-untyped-call]
                self._board.write(Event(wall_time=now, step=n_seen, summary=summary).SerializeToString())
        except OSError as err:
            raise OSError(f"{self._file} cannot be written, and the last checkpoint stays: {err}") from err

    def flush(self) -> None:
        """Write buffered entries to disk, before a checkpoint that relies on them."""
        self._lines.flush()
        self._board.flush()

    def close(self) -> None:
        # On a full disk, closing fails once more; `write` has already said so.
        for file in (self._lines, self._board):
            with suppress(OSError):
                file.close()


def _board(folder: Path, purge_step: int) -> RecordWriter:
    """Begin a file of TensorBoard events.

    SummaryWriter would write in a thread, where errors cannot be caught.
    """
    folder.mkdir(exist_ok=True)
    now = time.time()
    name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
    board = RecordWriter((folder / name).open("wb"))
    board.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    start = SessionLog(status=SessionLog.START)
    board.write(Event(wall_time=now, step=purge_step, session_log=start).SerializeToString())
    return board
