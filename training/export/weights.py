"""One weights file for all graphs: ONNX initializers that refer to a safetensors file.

A safetensors file is a JSON header followed by raw tensors, which ONNX can reference as external
data. So all rates share one copy of the weights, and PyTorch can load the same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from training.models.weights import EMBEDDING_ROWS

_MIN_BYTES = 256
"""Smaller tensors stay in the graph, where shape inference and constant folding can use them."""


@dataclass(frozen=True)
class Place:
    """The byte range of a tensor in the file. offset: from the start of the file"""

    offset: int
    length: int


def tensor_places(weights: Path) -> dict[bytes, Place]:
    """Index a safetensors file by the bytes of its tensors and joined qkv and embedding rows."""
    content = weights.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    header.pop("__metadata__", None)
    spans = {name: [8 + n_header + position for position in entry["data_offsets"]] for name, entry in header.items()}
    joined = [[*spans[name], *spans[name + EMBEDDING_ROWS]] for name in spans if name + EMBEDDING_ROWS in spans]
    ranges = [*spans.values(), *([first, last] for first, end, begin, last in joined if end == begin)]
    return {content[begin:end]: Place(begin, end - begin) for begin, end in ranges}


def reference_weights(graph: onnx.ModelProto, places: dict[bytes, Place], weights_file: str) -> int:
    """Replace initializers by references to the weights file; return the bytes that stay inline."""
    n_inline = 0
    for tensor in graph.graph.initializer:
        raw = onnx.numpy_helper.to_array(tensor).tobytes()
        place = places.get(raw) if len(raw) >= _MIN_BYTES else None
        if place is None:
            n_inline += len(raw)
            continue
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": weights_file, "offset": str(place.offset), "length": str(place.length)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items())
    return n_inline
