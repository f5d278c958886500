"""ONNX graphs by torch.export, tuned where it pays: linear layers as one Gemm each, on weights as PyTorch lays them."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxscript import opset20 as op
from torch import Tensor

from training.export.weights import point_into, tensor_places
from training.models.classifier import AdaptiveClassifier, FrozenClassifier

OPSET = 20
OUTPUTS = ["logits", "tokens", "gmacs"]


def export_onnx(classifier: FrozenClassifier, example: Tensor, file: Path, weights: Path) -> None:
    """Write the graph, its weights referenced in the safetensors file beside it.

    Batch is the only dynamic axis, but for a model that adapts: how many tokens a batch has left depends on its images.

    Shapes: example uint8 (B, H, W, 3) with B >= 2
    Raises: ValueError where more than a tenth of the weights would have to be copied into the graph.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's own internals
        program = torch.onnx.export(
            classifier,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=OUTPUTS if isinstance(classifier, AdaptiveClassifier) else OUTPUTS[:1],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={torch.ops.aten.linear.default: _linear},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    graph = program.model_proto
    n_inline = point_into(graph, tensor_places(weights), weights.name)
    if n_inline * 10 > weights.stat().st_size:
        raise ValueError(f"{file}: {n_inline} bytes of weights are not in {weights}; the graph would carry them again")
    _strip(graph)
    onnx.save(graph, file)
    onnx.checker.check_model(str(file))


def _strip(graph: onnx.ModelProto) -> None:
    """Drop stack traces and inferred types: three quarters of the file, of use to nobody who serves it."""
    del graph.metadata_props[:], graph.graph.metadata_props[:], graph.graph.value_info[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """One Gemm instead of a transposed copy of the weight, a MatMul and an Add.

    Keeps the weight in PyTorch's layout, so that the graphs can share the file that PyTorch saves, and was 3-7 %
    faster than MatMul in one trial on a CPU.

    Shapes: x (…, C_in), weight (C_out, C_in). Where the first axis alone is dynamic, the rest is constant in the graph.
    """
    *lead, n_in = x.shape
    inputs = (weight,) if bias is None else (weight, bias)
    if len(lead) == 1:
        return op.Gemm(x, *inputs, transB=1)
    rows = op.Reshape(x, _integers(-1, int(n_in)))
    if all(isinstance(side, int) for side in lead[1:]):
        shape = _integers(-1, *lead[1:], int(weight.shape[0]))
    else:
        shape = op.Concat(op.Shape(x, end=-1), _integers(int(weight.shape[0])), axis=0)
    return op.Reshape(op.Gemm(rows, *inputs, transB=1), shape)


def _integers(*values: int) -> Any:
    return op.Constant(value_ints=values)


class OnnxClassifier:
    """An exported graph, run as the service would on a CPU."""

    def __init__(self, file: Path, n_threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Any:
        """Return logits; of a model that adapts tokens and GMACs of each image too."""
        found = self._session.run(None, {"pixels": np.ascontiguousarray(pixels.numpy())})
        logits, *costs = (torch.from_numpy(array) for array in found)
        return (logits, costs[0], costs[1]) if costs else logits
