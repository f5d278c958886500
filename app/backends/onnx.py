"""ONNX Runtime, on the CPU or on CUDA."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from app.backends import BackendOptions, Outputs, Pixels, Runner
from app.errors import BackendError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 has a mantissa of 10 bits, so golden outputs would not match.
# An exhaustive search would run at each new batch size.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
ERRORS_ONLY = 3


class OnnxBackend:
    """One thread pool per session, without spinning.

    The global pool of ONNX Runtime always spins, and its Python API cannot switch that off. With more threads than free
    cores a run then took 120 ms of CPU time instead of 47 ms, and as much again after it ended.
    """

    def __init__(self, options: BackendOptions) -> None:
        self._provider = PROVIDERS[options.device]
        self._n_threads = options.n_threads
        self._share_weights = options.share_weights
        available = onnxruntime.get_available_providers()
        if self._provider not in available:
            raise BackendError(f"ONNX Runtime has no {self._provider}; available: {', '.join(available)}")
        if options.device == "cuda":
            # Finds the CUDA libraries that pip installed.
            onnxruntime.preload_dlls()

    def load(self, path: Path, input_name: str, outputs: Mapping[str, str]) -> Runner:
        try:
            session = onnxruntime.InferenceSession(str(path), self._make_options(), providers=self._list_providers())
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load the graph: {_first_line(error)}") from error
        # ONNX Runtime falls back to the CPU with only a log line.
        if session.get_providers()[0] != self._provider:
            raise BackendError(f"ONNX Runtime fell back from {self._provider} to {session.get_providers()[0]}")
        _require_names("input", [tensor.name for tensor in session.get_inputs()], input_name)
        for name in outputs.values():
            _require_names("output", [tensor.name for tensor in session.get_outputs()], name)
        return OnnxRunner(session, input_name, outputs)

    def _make_options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        # Without a fixed batch size the memory plan saves nothing over the arena, and planning takes four fifths of
        # the load time: 0.33 s instead of 0.06 s for 12 blocks.
        options.enable_mem_reuse = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._share_weights:
            # Prepacking would copy the weights for each session.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _list_providers(self) -> list[str | tuple[str, dict[str, str]]]:
        if self._provider == PROVIDERS["cuda"]:
            return [(self._provider, CUDA_OPTIONS), PROVIDERS["cpu"]]
        return [self._provider]


class OnnxRunner:
    def __init__(self, session: onnxruntime.InferenceSession, input_name: str, outputs: Mapping[str, str]) -> None:
        self._session, self._input_name = session, input_name
        self._roles, self._names = list(outputs), list(outputs.values())

    def run(self, pixels: Pixels) -> Outputs:
        return self._run(pixels, None)

    def run_within(self, pixels: Pixels, max_seconds: float) -> Outputs:
        options = onnxruntime.RunOptions()
        timer = threading.Timer(max_seconds, setattr, (options, "terminate", True))
        timer.start()
        try:
            return self._run(pixels, options)
        except BackendError as error:
            if options.terminate:
                raise BackendError(f"ONNX Runtime did not finish a run within {max_seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def _run(self, pixels: Pixels, options: onnxruntime.RunOptions | None) -> Outputs:
        try:
            arrays = self._session.run(self._names, {self._input_name: pixels}, options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot run the graph: {_first_line(error)}") from error
        return {role: np.asarray(array) for role, array in zip(self._roles, arrays, strict=True)}


def _require_names(what: str, names: list[str], wanted: str) -> None:
    if wanted not in names:
        raise BackendError(f"the graph has no {what} {wanted!r}; its {what}s: {', '.join(names)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
