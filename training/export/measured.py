"""Measurements of exported graphs: made once, and reused for identical files on the same images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from numpy.typing import NDArray

from training.data.decoded import DecodedImages
from training.data.sources import Source
from training.evaluate.accuracy import measure
from training.evaluate.progress import progress
from training.evaluate.results import Row, pack, read_evaluation, unpack
from training.evaluate.table import adaptive_row, fixed_row
from training.export.formats import GraphFormat
from training.export.manifest import EVALUATION, MANIFEST, WEIGHTS, sha256
from training.models.activations import images_at_once
from training.models.calibration import Calibration
from training.models.frozen import FrozenModule
from training.models.variants import variant_key
from training.tasks import find_task

BATCH_SIZE = 50
"""At most: fewer where the model is large."""
MEASURED = "measurements.json"  # in the work folder only, to resume from


@dataclass(frozen=True)
class Graph:
    """A graph to export, for all policies that share it. r: None where adaptive"""

    policies: tuple[str, ...]
    r: int | None
    module: FrozenModule
    calibration: Calibration | None = None

    def key(self, precision: str) -> str:
        """Return the variant key under the first of its policies, which names the file."""
        return variant_key(self.policies[0], self.r, precision)


def measured_row(
    exported: Any,
    graph: Graph,
    graph_format: GraphFormat,
    name: str,
    source: DecodedImages,
    work: Path,
    predecessor: Path | None,
    device: str = "cpu",
) -> tuple[Row, list[float], str]:
    """Measure a graph file, on the device it was loaded on; return the row, the tokens per block, and the date.

    An earlier measurement of identical files on the same images is reused: that of an interrupted
    export, or of the predecessor, a published version.
    """
    module, model = graph.module, graph.module.model
    kept = work / MEASURED
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{sha256(work / name)} {sha256(work / WEIGHTS)} {source.name} {source.split} {len(source)} {device}"
    if key in known:
        entry, packed, tokens, date = known[key]
        return Row(**{**entry, "scores": _read_scores(packed, entry["measure"], len(source))}), tokens, date
    tokens = [float(count) for count in model.tokens]
    if published := _published(predecessor, graph, graph_format, name, source, work):
        row, date = published
    else:
        date = datetime.now(UTC).date().isoformat()
        by, n_parallel = find_task(module.task).measure, cpu_count() if device == "cpu" else 1
        size = min(BATCH_SIZE, images_at_once(module.model.vit, n_parallel=n_parallel))
        batches = progress(source.batches(size), name, -(-len(source) // size))
        result = measure(exported, batches, n_parallel=n_parallel, by=by)
        if graph.calibration is not None and result.tokens is not None:
            row = adaptive_row(graph.calibration, result, graph_format.precision)
            tokens = result.tokens.mean(axis=0).tolist()
        else:
            precision, gmacs = graph_format.precision, module.gmacs()
            row = fixed_row(graph.policies[0], graph.r or 0, int(tokens[-1]), gmacs, result, precision)
    known[key] = [{**asdict(row), "scores": None}, _written_scores(row.scores), tokens, date]
    kept.write_text(json.dumps(known))
    return row, tokens, date


def _written_scores(scores: NDArray[Any]) -> str:
    with BytesIO() as file:
        np.save(file, pack(scores))
        return file.getvalue().hex()


def _read_scores(written: str, measure: str, n_images: int) -> NDArray[Any]:
    return unpack(np.load(BytesIO(bytes.fromhex(written))), measure, n_images)


def _published(
    predecessor: Path | None, graph: Graph, graph_format: GraphFormat, name: str, source: Source, work: Path
) -> tuple[Row, str] | None:
    """Return the predecessor's measurement of an identical graph on the same images, and its date.

    None where there is none, and for adaptive graphs, since an evaluation does not contain their
    tokens per block.
    """
    if predecessor is None or graph.r is None or not (predecessor / f"{EVALUATION}.json").is_file():
        return None
    manifest = json.loads((predecessor / MANIFEST).read_text())
    files = manifest["files"]
    if any(files.get(file, {}).get("sha256") != sha256(work / file) for file in (name, WEIGHTS)):
        return None
    found = read_evaluation(predecessor / f"{EVALUATION}.json")
    about = {"dataset": source.name, "split": source.split, "n_images": len(source)}
    row = next((row for row in found.rows if row.key == graph.key(graph_format.precision)), None)
    if row is None or any(found.about.get(field) != value for field, value in about.items()):
        return None
    return row, next(variant["accuracy"]["date"] for variant in manifest["variants"] if variant["file"] == name)
