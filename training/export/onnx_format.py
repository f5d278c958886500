"""ONNX graphs by torch.export. Each linear layer becomes one Gemm, in PyTorch's weight layout."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxscript import opset20 as op
from torch import Tensor

from training.export.scores import ShownScores, n_decisions
from training.export.weights import reference_weights, tensor_places
from training.models.frozen import FrozenModule
from training.tasks import graph_outputs

OPSET = 20
MIN_ONNXRUNTIME = "1.18"
"""The first release that reads the IR version of our graphs, 10: tried with 1.17.3, which refuses them, and 1.18.1."""
_CUDA = "CUDAExecutionProvider"
_SCORES, _FED = "scores.", "fed."
"""Names of the scores of each block that merges, and of the scores that replace them in a check."""


def export_onnx(module: FrozenModule, example: Tensor, file: Path, weights: Path) -> list[str]:
    """Write the graph, which references the weights file; return the files that it requires.

    The batch is the only dynamic axis of a graph with fixed r. In adaptive graphs token counts
    depend on the images.
    Shapes: example uint8 (B, H, W, 3) with B >= 2
    Raises: ValueError where more than a tenth of the weights would be copied into the graph.
    """
    outputs = [output.name for output in graph_outputs(module)]
    scores = [f"{_SCORES}{index}" for index in range(n_decisions(module))]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter warns about its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            ShownScores(module),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=[*outputs, *scores],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={torch.ops.aten.linear.default: _linear},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    graph = program.model_proto
    # The scores keep their names as inner values, by which `OnnxScores` finds them.
    del graph.graph.output[len(outputs) :]
    n_inline = reference_weights(graph, tensor_places(weights), weights.name)
    if n_inline * 10 > weights.stat().st_size:
        raise ValueError(f"{file}: {n_inline} bytes of weights are not in {weights}, so the graph would contain copies")
    _strip(graph)
    onnx.save(graph, file)
    onnx.checker.check_model(str(file))
    return [weights.name]


def _strip(graph: onnx.ModelProto) -> None:
    """Remove stack traces and inferred types, three quarters of the file, unused in serving."""
    del graph.metadata_props[:], graph.graph.metadata_props[:], graph.graph.value_info[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Translate a linear layer to one Gemm instead of a transpose, a MatMul and an Add.

    The weight keeps PyTorch's layout, so all graphs share one weights file. In one trial on a CPU,
    Gemm was 3-7 % faster than MatMul.
    Shapes: x (…, C_in), weight (C_out, C_in). Axes other than the first are constants of the graph
        where possible.
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
    """An exported graph, run as the service does."""

    def __init__(self, file: Path, n_threads: int = 1, device: str = "cpu") -> None:
        self._session = _open(str(file), file.parent, n_threads, device)

    def __call__(self, pixels: Tensor) -> Any:
        """Return the outputs of the graph: one tensor, or a tuple."""
        found = self._session.run(None, {"pixels": np.ascontiguousarray(pixels.numpy())})
        outputs = tuple(torch.from_numpy(array) for array in found)
        return outputs if len(outputs) > 1 else outputs[0]


class OnnxScores:
    """A graph file that also returns its scores, or decides by given scores.

    The file itself is loaded; only its inputs and outputs differ.
    is_fed: `run` takes the scores to decide by.
    """

    def __init__(self, file: Path, *, is_fed: bool = False, n_threads: int = 1) -> None:
        model = onnx.load(file, load_external_data=False)
        self._names = [name for node in model.graph.node for name in node.output if name.startswith(_SCORES)]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names)
        self._fed = [name.replace(_SCORES, _FED) for name in self._names] if is_fed else []
        for name, fed in zip(self._names, self._fed, strict=False):
            for node in model.graph.node:
                node.input[:] = [fed if value == name else value for value in node.input]
            info = onnx.helper.make_tensor_value_info(fed, onnx.TensorProto.FLOAT, [None, None, None])
            model.graph.input.append(info)
        self._session = _open(model.SerializeToString(), file.parent, n_threads)

    def __call__(self, pixels: Tensor, scores: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Return the outputs of the graph, and the scores of each block that merges."""
        fed = {name: tensor.numpy() for name, tensor in zip(self._fed, scores, strict=True)}
        found = self._session.run(None, {"pixels": np.ascontiguousarray(pixels.numpy()), **fed})
        return tuple(torch.from_numpy(array) for array in found)


def require_provider(device: str) -> None:
    """Raises: ValueError where this ONNX Runtime does not run on the device."""
    if device != "cpu" and _CUDA not in onnxruntime.get_available_providers():
        raise ValueError(
            f"--device {device}: ONNX Runtime has no {_CUDA}: install onnxruntime-gpu, or leave onnx out of --formats"
        )


def _open(model: str | bytes, folder: Path, n_threads: int, device: str = "cpu") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    # Where a model in memory finds its weights file.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if device == "cpu":
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # With TF32 results differ in the third digit.
    settings = {"device_id": device.partition(":")[2] or "0", "use_tf32": "0"}
    return onnxruntime.InferenceSession(model, options, providers=[(_CUDA, settings), "CPUExecutionProvider"])
