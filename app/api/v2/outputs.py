"""Outputs: the tensors of a response, one row per image.

Every task returns the output of its graph; DERIVED adds what a task computes from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.api.inference import probabilities_of
from app.observability.record import ImageResult
from app.store.manifest import Manifest
from app.store.outputs import LOGITS, TASKS

Results = Sequence[ImageResult]
# By numpy's kind.
DATATYPES = {"f": "FP32", "i": "INT64", "O": "BYTES"}


@dataclass(frozen=True)
class OutputTensor:
    """shape: of one image's row. compute: returns the rows. Shapes: (B, *shape)

    is_classifiable: whether Triton's `classification` parameter applies to it.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    compute: Callable[[Results], NDArray[Any]]
    is_classifiable: bool = False


def list_outputs(manifest: Manifest) -> list[OutputTensor]:
    """List the outputs of a model: those of its task, and the tokens and cost of each image."""
    main, n_counts = TASKS[manifest.task](manifest), manifest.architecture.depth + 1
    datatype = DATATYPES[np.dtype(main.dtype).kind]
    has_classes = main.role == LOGITS
    return [
        OutputTensor(main.name, datatype, main.shape, lambda results: _stack(results, main.role), has_classes),
        *(derive(manifest) for derive in DERIVED.get(manifest.task, ())),
        OutputTensor("tokens", "INT64", (n_counts,), lambda results: np.array([i.tokens for i in results], np.int64)),
        OutputTensor("gmacs", "FP32", (), lambda results: np.array([i.gmacs for i in results], np.float32)),
    ]


def _stack(results: Results, role: str) -> NDArray[Any]:
    return np.stack([result.outputs[role] for result in results])


def _probabilities(manifest: Manifest) -> OutputTensor:
    def compute(results: Results) -> NDArray[Any]:
        return probabilities_of(_stack(results, LOGITS), manifest).astype(np.float32)

    return OutputTensor("probabilities", "FP32", (len(manifest.labels),), compute, is_classifiable=True)


def _label(manifest: Manifest) -> OutputTensor:
    def compute(results: Results) -> NDArray[Any]:
        best = _stack(results, LOGITS).argmax(axis=1)
        return np.array([manifest.labels[index] for index in best], dtype=object)

    return OutputTensor("label", "BYTES", (), compute)


DERIVED: Mapping[str, Sequence[Callable[[Manifest], OutputTensor]]] = {"classify": (_probabilities, _label)}


def classify_rows(values: NDArray[np.float32], n_classes: int, labels: Sequence[str]) -> NDArray[Any]:
    """Format the highest values of each row as Triton does: `value:index:label`.

    Shapes: (B, classes) -> (B, n_classes)
    """
    best = np.argsort(-values, axis=1, kind="stable")[:, :n_classes]
    rows = [
        [f"{row[index]:f}:{index}:{labels[index]}" for index in indices]
        for row, indices in zip(values, best, strict=True)
    ]
    return np.array(rows, dtype=object)
