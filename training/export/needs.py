"""What an export needs: memory, disk and time, estimated before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from training.data.decoded import MAX_MEMORY_BYTES, pixel_bytes
from training.data.sources import Source
from training.export.formats import GraphFormat
from training.export.measured import Graph
from training.models.activations import BUDGET_BYTES, activation_bytes

_WEIGHT_COPIES = 6
"""Eager's, those with the embedding's rows, the exporter's two, the graph's and its serialised form."""
_LIBRARIES_BYTES = 1 << 30
_SECONDS_PER_BLOCK = 1.5
"""To write and load a graph."""
_N_CHECKED = 100
"""Images by which a graph is compared with eager, both counted."""


@dataclass(frozen=True)
class Needs:
    """Rough upper bounds. n_graphs: files to write"""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    n_graphs: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        return (
            f"{self.n_graphs} graphs need up to {self.memory_bytes / 1e9:.1f} GB of memory, "
            f"{self.disk_bytes / 1e6:.0f} MB of disk and {time}"
        )


@torch.no_grad()
def needs(vit: nn.Module, graphs: Sequence[Graph], source: Source, graph_formats: Sequence[GraphFormat]) -> Needs:
    """Estimate the needs of an export; the time from that of one image."""
    n_graphs = len(graphs) * len(graph_formats)
    weights = sum(tensor.nbytes for tensor in vit.state_dict().values())
    pixels = pixel_bytes(source)
    n_copies = 1 + len(graphs) * sum(entry.contains_weights for entry in graph_formats)
    image = source[0][0].unsqueeze(0)
    graphs[0].module(image)
    started_at = time.perf_counter()
    graphs[0].module(image)
    per_image = time.perf_counter() - started_at
    depth = len(vit.blocks)  # type: ignore[arg-type]
    return Needs(
        memory_bytes=_LIBRARIES_BYTES
        + _WEIGHT_COPIES * weights
        + 3 * max(BUDGET_BYTES, activation_bytes(vit))
        + min(pixels, MAX_MEMORY_BYTES),
        disk_bytes=n_copies * weights + (pixels if pixels > MAX_MEMORY_BYTES else 0),
        seconds=n_graphs * (_SECONDS_PER_BLOCK * depth + (len(source) + _N_CHECKED) * per_image),
        n_graphs=n_graphs,
    )
