"""ONNX Runtime, on the CPU or on CUDA."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from app.backends import Answer, BackendOptions, Pixels, Runner
from app.errors import BackendError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 keeps 10 bits of mantissa: golden outputs would not match. Exhaustive search would run for every new batch size.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
ERRORS_ONLY = 3


class OnnxBackend:
    """Sessions with a pool of their own each, and no spinning.

    ONNX Runtime's one pool for all sessions always spins, and Python cannot tell it not to: 120 ms of CPU instead of
    47 ms for the same run where threads outnumber free cores, and as much again after it. Threads that sleep are free.
    """

    def __init__(self, options: BackendOptions) -> None:
        self._provider = PROVIDERS[options.device]
        self._n_threads = options.n_threads
        self._share_weights = options.share_weights
        available = onnxruntime.get_available_providers()
        if self._provider not in available:
            raise BackendError(f"ONNX Runtime has no {self._provider} here, only {', '.join(available)}")
        if options.device == "cuda":
            onnxruntime.preload_dlls()  # finds CUDA libraries that pip installed

    def load(self, path: Path, input_name: str, output_names: Sequence[str]) -> Runner:
        try:
            session = onnxruntime.InferenceSession(str(path), self._make_options(), providers=self._list_providers())
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load it: {_first_line(error)}") from error
        if session.get_providers()[0] != self._provider:  # it falls back to the CPU with no more than a log line
            raise BackendError(f"ONNX Runtime did not take {self._provider} but {session.get_providers()[0]}")
        _require_names("input", [tensor.name for tensor in session.get_inputs()], input_name)
        for name in output_names:
            _require_names("output", [tensor.name for tensor in session.get_outputs()], name)
        return OnnxRunner(session, input_name, output_names)

    def _make_options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        # Planned for a batch of unknown size, reuse of buffers saves nothing (the arena does it), and planning it is
        # four fifths of the time to load: 0.33 s instead of 0.06 s for 12 blocks.
        options.enable_mem_reuse = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._share_weights:  # a prepacked copy per session would undo the sharing of the mapped file
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _list_providers(self) -> list[str | tuple[str, dict[str, str]]]:
        if self._provider == PROVIDERS["cuda"]:
            return [(self._provider, CUDA_OPTIONS), PROVIDERS["cpu"]]
        return [self._provider]


class OnnxRunner:
    def __init__(self, session: onnxruntime.InferenceSession, input_name: str, output_names: Sequence[str]) -> None:
        self._session, self._input_name, self._output_names = session, input_name, list(output_names)

    def run(self, pixels: Pixels) -> Answer:
        try:
            outputs = self._session.run(self._output_names, {self._input_name: pixels})
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot run it: {_first_line(error)}") from error
        return Answer(*(np.asarray(output) for output in outputs))


def _require_names(what: str, names: list[str], wanted: str) -> None:
    if wanted not in names:
        raise BackendError(f"the graph has no {what} {wanted!r}, only {names}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
