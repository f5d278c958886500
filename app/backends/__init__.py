"""Backends: an engine turns a graph file into a runner. A new engine is one file here, and one line in ENGINES."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from app.errors import BackendError

Pixels = NDArray[np.uint8]
# Arrays with one row per image, by role ("logits", …).
Outputs = Mapping[str, NDArray[Any]]


class Runner(Protocol):
    """A loaded graph."""

    def run(self, pixels: Pixels) -> Outputs:
        """Compute the outputs of a batch.

        Shapes: pixels (B, H, W, 3); each output (B, …)
        Raises: BackendError.
        """
        ...


@runtime_checkable
class InterruptibleRunner(Runner, Protocol):
    """A loaded graph whose run can be ended: one that loops for ever would hang the start."""

    def run_within(self, pixels: Pixels, max_seconds: float) -> Outputs:
        """Compute the outputs of a batch, or give up after this time.

        Raises: BackendError.
        """
        ...


class Backend(Protocol):
    """An engine on a device."""

    def load(self, path: Path, input_name: str, outputs: Mapping[str, str]) -> Runner:
        """Load a graph file. Thread-safe.

        outputs: name of each output in the graph, by role, in the graph's order.
        Raises: BackendError.
        """
        ...


@dataclass(frozen=True)
class BackendOptions:
    device: str
    n_threads: int
    share_weights: bool


@dataclass(frozen=True)
class Engine:
    """What the service knows about an engine before importing it.

    graph_format: the format of the graphs that it reads.
    platform, triton_backend: names in the Open Inference Protocol and in Triton's model configuration.
    can_share_weights: whether it reads `BackendOptions.share_weights` on the CPU.
    """

    module: str
    backend: str
    graph_format: str
    platform: str
    triton_backend: str
    can_share_weights: bool = False


ENGINES: Mapping[str, Engine] = {
    "onnxruntime": Engine(
        "app.backends.onnx", "OnnxBackend", "onnx", "onnxruntime_onnx", "onnxruntime", can_share_weights=True
    ),
    "torchscript": Engine(
        "app.backends.torchscript", "TorchScriptBackend", "torchscript", "pytorch_libtorch", "pytorch"
    ),
}


def open_backend(engine: str, options: BackendOptions) -> Backend:
    """Import an engine and open it on a device.

    Raises: BackendError if the engine is not installed or the device is not available.
    """
    try:
        module = importlib.import_module(ENGINES[engine].module)
    except ImportError as error:
        raise BackendError(f"the engine {engine} is not installed: {error}") from error
    backend: Backend = getattr(module, ENGINES[engine].backend)(options)
    return backend
