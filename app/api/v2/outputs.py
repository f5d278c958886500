"""Outputs: the tensors of a response, one row per image. A new task is one entry in TASKS."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.api.inference import softmax
from app.observability.record import ImageResult
from app.store.manifest import Manifest
from app.store.outputs import LOGITS

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
    n_counts = manifest.architecture.depth + 1
    return [
        *TASKS[manifest.task](manifest),
        OutputTensor("tokens", "INT64", (n_counts,), lambda results: np.array([i.tokens for i in results], np.int64)),
        OutputTensor("gmacs", "FP32", (), lambda results: np.array([i.gmacs for i in results], np.float32)),
    ]


def _list_classify(manifest: Manifest) -> list[OutputTensor]:
    labels, shape = manifest.labels, (len(manifest.labels),)

    def label(results: Results) -> NDArray[Any]:
        return np.array([labels[index] for index in _logits(results).argmax(axis=1)], dtype=object)

    def probabilities(results: Results) -> NDArray[Any]:
        return softmax(_logits(results)).astype(np.float32)

    return [
        OutputTensor(manifest.output.name, "FP32", shape, _logits, is_classifiable=True),
        OutputTensor("probabilities", "FP32", shape, probabilities, is_classifiable=True),
        OutputTensor("label", "BYTES", (), label),
    ]


def _logits(results: Results) -> NDArray[np.float32]:
    return np.stack([result.outputs[LOGITS] for result in results])


TASKS: Mapping[str, Callable[[Manifest], list[OutputTensor]]] = {"classify": _list_classify}


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
