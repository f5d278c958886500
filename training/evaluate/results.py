"""What an evaluation leaves behind: a JSON file of figures and, beside it, which images each row got right.

The JSON file says which rows are done; `<out>.npz` holds one packed bool array a row, so that any two rows can be
paired later, image by image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """One policy at one rate, or one that adapts to the image by calibrated thresholds: then r is None.

    Units: gmacs for one image, of an adaptive policy the mean, with 5th and 95th percentile; max_accuracy_drop, which
    the thresholds were calibrated for, in points; images_per_second of inference alone.
    Shapes: is_right bool (n_images,), in the order of the images
    """

    policy: str
    r: int | None
    tokens_left: float
    gmacs: float
    top1: float
    ci95: tuple[float, float]
    n_images: int
    images_per_second: float
    is_right: NDArray[np.bool_] = field(repr=False, compare=False)
    metric: str | None = None
    max_accuracy_drop: float | None = None
    gmacs_p5: float | None = None
    gmacs_p95: float | None = None

    @property
    def key(self) -> str:
        if self.r is None:
            return adaptive_key(self.policy, self.metric, self.max_accuracy_drop)
        return f"{self.policy}-r{self.r}"

    @property
    def series(self) -> str:
        """What belongs together in a table and on a line: the policy and, of one that adapts, its metric."""
        return self.policy if self.metric in (None, "embedding") else f"{self.policy} ({self.metric})"

    @property
    def setting(self) -> str:
        return f"r={self.r}" if self.r is not None else f"drop {self.max_accuracy_drop:g}"


def adaptive_key(policy: str, metric: str | None, max_accuracy_drop: float | None) -> str:
    """Return the key of a row that adapts."""
    return f"{policy}-{metric}-drop{max_accuracy_drop:g}"


@dataclass(frozen=True)
class Evaluation:
    """Rows measured on the same images. about: of which model, on which images; see `training.cli.evaluate`."""

    about: dict[str, Any]
    rows: list[Row]


def with_suffix(out: Path, suffix: str) -> Path:
    """Return the file of `--out` with that suffix, whatever dots its name has already."""
    return out.with_name(out.name + suffix)


def write_evaluation(out: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `<out>.npz`, then `<out>.json`, each under a temporary name: no row is ever in the latter alone."""
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays, figures = with_suffix(out, ".npz"), with_suffix(out, ".json")
    with _temporary(arrays).open("wb") as file:
        packed: dict[str, Any] = {row.key: np.packbits(row.is_right) for row in rows}
        np.savez(file, **packed)
    _temporary(arrays).replace(arrays)
    content = {"about": about, "rows": [_entry(row) for row in rows]}
    _temporary(figures).write_text(json.dumps(content, indent=2) + "\n")
    _temporary(figures).replace(figures)


def read_evaluation(file: Path) -> Evaluation:
    """Read an evaluation from its JSON file and the arrays beside it.

    Raises: FileNotFoundError for either file; ValueError where it is no evaluation, or a row lacks its array or has one
        that does not give the row's top-1.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no evaluation {file}")
    beside = file.with_suffix(".npz")
    if not beside.is_file():
        raise FileNotFoundError(f"no {beside} that says which images the rows of {file} got right: evaluate again")
    try:
        content = json.loads(file.read_text())
        with np.load(beside) as arrays:
            rows = [_row(entry, arrays) for entry in content["rows"]]
        return Evaluation(content["about"], rows)
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{file} and {beside.name} are no evaluation: {err}") from err


def finished_rows(out: Path, about: dict[str, Any]) -> list[Row]:
    """Read the rows of an interrupted evaluation; none where there is no file.

    Raises: as `read_evaluation`; ValueError where the file tells of another evaluation.
    """
    file = with_suffix(out, ".json")
    if not file.exists():
        return []
    found = json.loads(file.read_text()).get("about")
    if found != about:
        raise ValueError(f"{file} holds another evaluation, {found}, not {about}: give another --out")
    return read_evaluation(file).rows


def _entry(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "is_right" and value is not None}


def _row(entry: dict[str, Any], arrays: Any) -> Row:
    row = Row(**{"r": None, **entry, "ci95": tuple(entry["ci95"])}, is_right=np.empty(0, bool))
    if row.key not in arrays:
        raise ValueError(f"row {row.key} has no array")
    is_right = np.unpackbits(arrays[row.key], count=row.n_images).astype(bool)
    if is_right.mean() != row.top1:
        raise ValueError(f"the array of {row.key} says top-1 {is_right.mean()}, the row {row.top1}")
    return replace(row, is_right=is_right)


def _temporary(file: Path) -> Path:
    return file.with_name(file.name + ".tmp")
