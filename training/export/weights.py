"""One weights file for every graph: the initializers of the ONNX graphs point into the model's safetensors file.

A safetensors file is a JSON header and then the raw tensors, which is what ONNX calls external data: so nine rates are
one model on disk, and the same file loads back into PyTorch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from training.models.weights import EMBEDDING_ROWS

_MIN_BYTES = 256  # smaller ones stay in the graph, where shape inference and constant folding can see them


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in the file. Units: bytes from the file's begin."""

    offset: int
    length: int


def tensor_places(weights: Path) -> dict[bytes, Place]:
    """Index a safetensors file by the bytes of its tensors, and of a qkv layer's with the embedding's right behind."""
    content = weights.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    header.pop("__metadata__", None)
    spans = {name: [8 + n_header + position for position in entry["data_offsets"]] for name, entry in header.items()}
    joined = [[*spans[name], *spans[name + EMBEDDING_ROWS]] for name in spans if name + EMBEDDING_ROWS in spans]
    stretches = [*spans.values(), *([first, last] for first, end, begin, last in joined if end == begin)]
    return {content[begin:end]: Place(begin, end - begin) for begin, end in stretches}


def point_into(graph: onnx.ModelProto, places: dict[bytes, Place], weights_file: str) -> int:
    """Replace every initializer that the weights file holds by a reference into it; return the bytes left inside."""
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
