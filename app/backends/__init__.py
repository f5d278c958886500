"""Backend: what turns a graph file into something that runs. One file per engine, one line in the registry."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """A loaded graph."""

    def run(self, pixels: Pixels) -> Logits:
        """Compute the logits of a batch.

        Shapes: pixels (B, H, W, 3) -> (B, classes).
        Raises: BackendError.
        """
        ...


class Backend(Protocol):
    """An engine on a device."""

    def load(self, path: Path, input_name: str, output_name: str) -> Runner:
        """Load a graph file. Safe to call from several threads.

        Raises: BackendError.
        """
        ...


@dataclass(frozen=True)
class BackendOptions:
    device: str
    n_threads: int
    share_weights: bool


def _open_onnx(options: BackendOptions) -> Backend:
    from app.backends.onnx import OnnxBackend

    return OnnxBackend(options)


def _open_torchscript(options: BackendOptions) -> Backend:
    from app.backends.torchscript import TorchScriptBackend  # needs PyTorch, which the service does without

    return TorchScriptBackend(options)


BACKENDS: dict[str, Callable[[BackendOptions], Backend]] = {"onnx": _open_onnx, "torchscript": _open_torchscript}


def open_backend(graph_format: str, options: BackendOptions) -> Backend:
    """Open the engine for a graph format.

    Raises: BackendError if the engine or the device is not there.
    """
    return BACKENDS[graph_format](options)
