"""Graph formats: how a graph of each format and precision is written, and how it is run.

To add a precision, add a converter module and an entry to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from training.export.onnx_format import OPSET, OnnxClassifier, export_onnx
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.models.frozen import FrozenModule
from training.models.variants import FLOAT32

Exported: TypeAlias = Callable[[Tensor], Any]
"""Shapes: uint8 (B, H, W, 3) -> the outputs of the graph's task, one tensor or several"""


@dataclass(frozen=True)
class GraphFormat:
    """One format at one precision.

    write: (module, example uint8 (B, H, W, 3), graph file, weights file of the version) -> the
        names of the files that the graph requires. A converter of another precision writes its own
        weights next to the graph.
    load: run a graph on the CPU, as the service does.
    parity_tolerance: largest accepted difference of the result from eager; None means that of the
        export. A format with a tolerance of its own computes other numbers than eager, so its
        golden outputs are the graph's.
    """

    name: str
    precision: str
    suffix: str
    opset: int | None
    write: Callable[[FrozenModule, Tensor, Path, Path], list[str]]
    load: Callable[[Path], Exported]
    parity_tolerance: float | None = None


FORMATS = (
    GraphFormat("onnx", FLOAT32, ".onnx", OPSET, write=export_onnx, load=OnnxClassifier),
    GraphFormat("torchscript", FLOAT32, ".pt", None, write=export_torchscript, load=TorchScriptClassifier),
)
FORMAT_NAMES = tuple(dict.fromkeys(entry.name for entry in FORMATS))
PRECISIONS = tuple(dict.fromkeys(entry.precision for entry in FORMATS))


def find_format(name: str, precision: str) -> GraphFormat:
    """Return the entry of a format and precision. Raises: ValueError where there is none."""
    for entry in FORMATS:
        if (entry.name, entry.precision) == (name, precision):
            return entry
    known = ", ".join(f"{entry.name} {entry.precision}" for entry in FORMATS)
    raise ValueError(f"format {name} with precision {precision}: expected one of {known}")
