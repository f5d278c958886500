"""Backend: what turns a graph file into something that runs. One file per engine, one line in the registry."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.errors import BackendError

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a graph answers for a batch. Units: GMACs.

    Shapes: logits (B, classes); where token counts depend on the image tokens int64 (B, blocks + 1), gmacs float32 (B,)
    """

    logits: Logits
    tokens: NDArray[np.int64] | None = None
    gmacs: NDArray[np.float32] | None = None


class Runner(Protocol):
    """A loaded graph."""

    def run(self, pixels: Pixels) -> Answer:
        """Compute the answer for a batch.

        Shapes: pixels (B, H, W, 3)
        Raises: BackendError.
        """
        ...


class Backend(Protocol):
    """An engine on a device."""

    def load(self, path: Path, input_name: str, output_names: Sequence[str]) -> Runner:
        """Load a graph file. Safe to call from several threads.

        output_names: of the logits and, where token counts depend on the image, of tokens and GMACs.
        Raises: BackendError.
        """
        ...


@dataclass(frozen=True)
class BackendOptions:
    device: str
    n_threads: int
    share_weights: bool


# Imported when opened: each needs its engine installed, and only one of them is chosen.
BACKENDS = {
    "onnx": ("app.backends.onnx", "OnnxBackend"),
    "torchscript": ("app.backends.torchscript", "TorchScriptBackend"),
}


def open_backend(graph_format: str, options: BackendOptions) -> Backend:
    """Open the engine for a graph format.

    Raises: BackendError if the engine or the device is not there.
    """
    module, name = BACKENDS[graph_format]
    try:
        backend: Backend = getattr(importlib.import_module(module), name)(options)
    except ImportError as error:
        raise BackendError(f"the engine for {graph_format} graphs is not installed: {error}") from error
    return backend
