"""Graph formats: how a graph of each format and precision is written, and how it is run.

To add a precision, add a converter module and an entry to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from training.export.onnx_format import OPSET, OnnxClassifier, OnnxScores, export_onnx, require_provider
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript, traced_scores
from training.models.frozen import FrozenModule
from training.models.variants import FLOAT32

Exported: TypeAlias = Callable[[Tensor], Any]
"""Shapes: uint8 (B, H, W, 3) -> the outputs of the graph's task, one tensor or several"""
Shown: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
"""Shapes: uint8 (B, H, W, 3) -> the outputs, and (B, |A|, |B|) scores for each block that merges"""


@dataclass(frozen=True)
class GraphFormat:
    """One format at one precision.

    write: (module, example uint8 (B, H, W, 3), graph file, weights file of the version) -> the
        names of the files that the graph requires. A converter of another precision writes its own
        weights next to the graph.
    load: (graph file, device="cpu") -> the graph, run as the service does.
    require: raises ValueError where graphs of this format do not run on a device here.
    show: (module, example, graph file) -> the graph with its scores after its outputs, by which
        parity follows its decisions; None where they cannot be taken out, and then results alone
        are compared.
    feed: graph file -> the graph that decides by given scores: (pixels, scores) -> as `show`.
    parity_tolerance: largest accepted difference of the result from eager; None means that of the
        export. A format with a tolerance of its own computes other numbers than eager, so its
        golden outputs are the graph's.
    contains_weights: whether each file has a copy of the weights.
    """

    name: str
    precision: str
    suffix: str
    opset: int | None
    write: Callable[[FrozenModule, Tensor, Path, Path], list[str]]
    load: Callable[..., Exported]
    require: Callable[[str], None] = lambda device: None
    show: Callable[[FrozenModule, Tensor, Path], Shown] | None = None
    feed: Callable[[Path], Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]] | None = None
    parity_tolerance: float | None = None
    contains_weights: bool = False


FORMATS = (
    GraphFormat(
        "onnx",
        FLOAT32,
        ".onnx",
        OPSET,
        write=export_onnx,
        load=OnnxClassifier,
        require=require_provider,
        show=lambda module, example, file: OnnxScores(file),
        feed=lambda file: OnnxScores(file, is_fed=True),
    ),
    GraphFormat(
        "torchscript",
        FLOAT32,
        ".pt",
        None,
        write=export_torchscript,
        load=TorchScriptClassifier,
        show=lambda module, example, file: traced_scores(module, example),
        contains_weights=True,
    ),
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
