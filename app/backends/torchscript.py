"""TorchScript, on the CPU or on CUDA. The only place where the service imports PyTorch."""

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.backends import BackendOptions, Outputs, Pixels, Runner
from app.errors import BackendError


class TorchScriptBackend:
    def __init__(self, options: BackendOptions) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BackendError("PyTorch found no CUDA device")
        torch.set_num_threads(options.n_threads)
        # Golden outputs are float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._device = torch.device(options.device)
        # catch_warnings changes the whole process.
        self._loading = threading.Lock()

    def load(self, path: Path, input_name: str, outputs: Mapping[str, str]) -> Runner:
        try:
            with self._loading, warnings.catch_warnings():
                # TorchScript warns at each load that it is deprecated.
                warnings.simplefilter("ignore")
                module = torch.jit.load(str(path), map_location=self._device)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise BackendError(f"PyTorch cannot load the graph: {_last_line(error)}") from error
        move_constants(module, self._device)
        return TorchScriptRunner(module.eval(), self._device, list(outputs))


def move_constants(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Make a traced graph create its tensors on a device.

    A trace records its device as a constant, and `map_location` moves only weights. A merging model traced on the CPU
    would index tokens on the GPU with row numbers on the CPU.
    """
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "forward")]
    for node in (node for part in parts for node in part.graph.findAllNodes("prim::Constant")):
        if str(node.output().type()) == "Device":
            node.s_("value", str(device))


class TorchScriptRunner:
    """A module that returns one tensor, or a tuple of one tensor per output: TorchScript outputs have no names."""

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device, roles: list[str]) -> None:
        self._module, self._device, self._roles = module, device, roles

    def run(self, pixels: Pixels) -> Outputs:
        try:
            # The profiling executor would recompile for seconds at each new batch size.
            with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
                found = self._module(batch.to(self._device))
                arrays = [tensor.cpu().numpy() for tensor in (found if isinstance(found, tuple) else (found,))]
        except Exception as error:
            raise BackendError(f"PyTorch cannot run the graph: {_last_line(error)}") from error
        if len(arrays) != len(self._roles):
            raise BackendError(f"the graph has {len(arrays)} outputs, expected {len(self._roles)}")
        return dict(zip(self._roles, arrays, strict=True))


def _last_line(error: Exception) -> str:
    # TorchScript prints the reason after its stack.
    return str(error).strip().split("\n")[-1]
