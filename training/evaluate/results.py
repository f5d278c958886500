"""Files of an evaluation: figures in `<out>.json`, scores by image in `<out>.npz`.

The JSON file lists the finished rows. The arrays allow any two rows to be compared later, image by
image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.merging.policies import find_policy
from training.models.variants import FLOAT32, variant_key
from training.tasks import find_measure
from training.tasks.measure import TOP1


@dataclass(frozen=True)
class Row:
    """One policy at one rate, or an adaptive policy with its calibrated thresholds; then r is None.

    Units: gmacs per image, for an adaptive policy the mean, with the 5th and 95th percentile;
        max_accuracy_drop, the bound of the calibration, in points; images_per_second of inference
        alone.
    value: of the measure of that name, from 0 to 1.
    Shapes: scores (n_images, …), in the order of the images; for top-1, bool: which are right
    """

    policy: str
    r: int | None
    tokens_left: float
    gmacs: float
    value: float
    ci95: tuple[float, float]
    n_images: int
    images_per_second: float
    scores: NDArray[Any] = field(repr=False, compare=False)
    metric: str | None = None
    max_accuracy_drop: float | None = None
    gmacs_p5: float | None = None
    gmacs_p95: float | None = None
    precision: str = FLOAT32
    measure: str = TOP1.name

    @property
    def key(self) -> str:
        if self.r is None:
            return adaptive_key(self.policy, self.metric, self.max_accuracy_drop, self.precision)
        return variant_key(self.policy, self.r, self.precision)

    @property
    def series(self) -> str:
        """The policy's label and any reduced precision: one line in plots."""
        label = find_policy(self.policy, self.metric).label
        return label if self.precision == FLOAT32 else f"{label} {self.precision}"

    @property
    def setting(self) -> str:
        return f"r={self.r}" if self.r is not None else f"drop {self.max_accuracy_drop:g}"


def adaptive_key(policy: str, metric: str | None, max_accuracy_drop: float | None, precision: str = FLOAT32) -> str:
    """Return the key of an adaptive row."""
    return variant_key(f"{policy}-{metric}-drop{max_accuracy_drop:g}", None, precision)


@dataclass(frozen=True)
class Evaluation:
    """Rows measured on the same images. about: the model and the images"""

    about: dict[str, Any]
    rows: list[Row]


def with_suffix(out: Path, suffix: str) -> Path:
    """Append a suffix to the name that --out gives; dots in the name are kept."""
    return out.with_name(out.name + suffix)


def write_evaluation(out: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `<out>.npz`, then `<out>.json`, each atomically, so that no row lacks its array."""
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays, figures = with_suffix(out, ".npz"), with_suffix(out, ".json")
    with _temporary(arrays).open("wb") as file:
        packed: dict[str, Any] = {row.key: pack(row.scores) for row in rows}
        np.savez(file, **packed)
    _temporary(arrays).replace(arrays)
    content = {"about": about, "rows": [_entry(row) for row in rows]}
    _temporary(figures).write_text(json.dumps(content, indent=2) + "\n")
    _temporary(figures).replace(figures)


def read_evaluation(file: Path) -> Evaluation:
    """Read an evaluation: the JSON file and the arrays next to it.

    Raises: FileNotFoundError for either file; ValueError where the files are not an evaluation, or
        the array of a row is missing or contradicts its top-1.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no evaluation {file}")
    array_file = file.with_suffix(".npz")
    if not array_file.is_file():
        raise FileNotFoundError(
            f"no {array_file}, which has the scores of each row of {file}, image by image: evaluate again"
        )
    try:
        content = json.loads(file.read_text())
        with np.load(array_file) as arrays:
            rows = [_row(entry, arrays) for entry in content["rows"]]
        return Evaluation(content["about"], rows)
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{file} and {array_file.name} are not an evaluation: {err}") from err


def finished_rows(out: Path, about: dict[str, Any]) -> list[Row]:
    """Read the finished rows of an interrupted evaluation; an empty list where there is no file.

    Raises: as `read_evaluation`; ValueError where the file is of another evaluation.
    """
    file = with_suffix(out, ".json")
    if not file.exists():
        return []
    found = json.loads(file.read_text()).get("about")
    if found != about:
        raise ValueError(f"{file} holds another evaluation, {found}, not {about}: choose another --out")
    return read_evaluation(file).rows


def pack(scores: NDArray[Any]) -> NDArray[Any]:
    """Pack bools into bits; other scores are kept as they are."""
    return np.packbits(scores) if scores.dtype == bool else scores


def unpack(packed: NDArray[Any], measure: str, n_images: int) -> NDArray[Any]:
    """Return the scores that `pack` packed."""
    return np.unpackbits(packed, count=n_images).astype(bool) if measure == TOP1.name else packed


def value_entry(measure: str, value: float) -> dict[str, Any]:
    """Return the entry of a measure, in evaluations and in the manifest."""
    return {TOP1.name: value} if measure == TOP1.name else {"measure": measure, "value": value}


def _entry(row: Row) -> dict[str, Any]:
    """Return a row as JSON, without what is absent or unmarked."""
    entry: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name == "value":
            entry |= value_entry(row.measure, value)
        elif name not in ("scores", "measure") and value is not None:
            entry[name] = value
    if row.precision == FLOAT32:
        del entry["precision"]
    return entry


def _row(entry: dict[str, Any], arrays: Any) -> Row:
    stated = dict(entry)
    measure = find_measure(stated.pop("measure", TOP1.name))
    value = stated.pop(TOP1.name if measure is TOP1 else "value")
    row = Row(
        **{"r": None, **stated, "ci95": tuple(entry["ci95"])}, value=value, measure=measure.name, scores=np.empty(0)
    )
    if row.key not in arrays:
        raise ValueError(f"row {row.key} has no array")
    scores = unpack(arrays[row.key], measure.name, row.n_images)
    if not math.isclose(found := measure.summarise(scores)[0], value, rel_tol=1e-9):
        raise ValueError(f"row {row.key} has {measure.label} {value}, its array {found}")
    return replace(row, scores=scores)


def _temporary(file: Path) -> Path:
    return file.with_name(file.name + ".tmp")
