"""Outputs: the tensors that an answer has, one row per image. Pure functions.

Shapes: logits and probabilities (B, classes), label (B,), tokens (B, blocks + 1), gmacs (B,)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.api.exchanges import softmax
from app.backends import Logits
from app.manifest import Manifest
from app.serving.entry import Done

PROBABILITIES, LABEL, TOKENS, GMACS = "probabilities", "label", "tokens", "gmacs"
CLASSIFIABLE = (PROBABILITIES,)  # besides the logits, whose name is the manifest's
DATATYPES = {"f": "FP32", "i": "INT64", "O": "BYTES"}  # by numpy's kind


def list_outputs(manifest: Manifest) -> list[str]:
    return [manifest.output.name, PROBABILITIES, LABEL, TOKENS, GMACS]


def make_output(name: str, done: Sequence[Done], labels: Sequence[str]) -> NDArray[Any]:
    """Compute one output of a request; a name that is none of ours is that of the logits."""
    logits = np.stack([item.logits for item in done])
    match name:
        case "probabilities":
            return softmax(logits).astype(np.float32)
        case "label":
            return np.array([labels[place] for place in logits.argmax(axis=1)], dtype=object)
        case "tokens":
            kept = [item.variant.entry.tokens if item.tokens is None else item.tokens for item in done]
            return np.array(kept, np.int64)
        case "gmacs":
            return np.array(list_gmacs(done), np.float32)
    return logits


def list_gmacs(done: Sequence[Done]) -> list[float]:
    """List what each image took."""
    return [item.variant.entry.gmacs if item.gmacs is None else item.gmacs for item in done]


def classify_rows(values: Logits, n_classes: int, labels: Sequence[str]) -> NDArray[Any]:
    """Write the highest values of each row as Triton's classification does: `value:index:label`.

    Shapes: (B, classes) -> (B, n_classes)
    """
    best = np.argsort(-values, axis=1, kind="stable")[:, :n_classes]
    rows = [
        [f"{row[place]:f}:{place}:{labels[place]}" for place in places]
        for row, places in zip(values, best, strict=True)
    ]
    return np.array(rows, dtype=object)
