import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from app.backends import ENGINES, BackendOptions, open_backend
from app.backends.torchscript import move_constants
from app.errors import BackendError
from tests.app.conftest import OPTIONS
from tests.app.tiny_store import ATM_BIAS, SIDE, expected_costs, expected_logits, write_store

SUFFIXES = {"onnxruntime": "onnx", "torchscript": "pt"}
LOGITS = {"logits": "logits"}
ALL = {**LOGITS, "tokens": "tokens", "gmacs": "gmacs"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("both"), formats=("onnx", "torchscript"))


@pytest.mark.parametrize("engine", SUFFIXES)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_runner_computes_the_graph_for_any_batch_size(folder: Path, engine: str, batch: int) -> None:
    runner = open_backend(engine, OPTIONS).load(folder / f"tome-r8.{SUFFIXES[engine]}", "pixels", LOGITS)
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)
    pixels.flags.writeable = False
    logits = runner.run(pixels)["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(pixels, 8), atol=1e-5)


def test_onnx_computes_the_same_with_shared_weights(folder: Path) -> None:
    pixels = np.full((1, SIDE, SIDE, 3), 77, np.uint8)
    options = BackendOptions("cpu", 2, share_weights=True)
    runner = open_backend("onnxruntime", options).load(folder / "tome-r8.onnx", "pixels", LOGITS)
    np.testing.assert_allclose(runner.run(pixels)["logits"], expected_logits(pixels, 8), atol=1e-5)


@pytest.mark.parametrize("engine", SUFFIXES)
def test_load_translates_errors_of_the_engine(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError) as caught:
        open_backend(engine, OPTIONS).load(path, "pixels", LOGITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", SUFFIXES)
def test_run_translates_errors_of_the_engine(folder: Path, engine: str) -> None:
    runner = open_backend(engine, OPTIONS).load(folder / f"tome-r8.{SUFFIXES[engine]}", "pixels", LOGITS)
    with pytest.raises(BackendError):
        runner.run(np.zeros((1, 2, 3), np.uint8))


@pytest.mark.parametrize(("names", "word"), [(("image", "logits"), "input"), (("pixels", "scores"), "output")])
def test_onnx_load_refuses_a_graph_with_other_names(folder: Path, names: tuple[str, str], word: str) -> None:
    with pytest.raises(BackendError, match=f"no {word}"):
        open_backend("onnxruntime", OPTIONS).load(folder / "tome-r8.onnx", names[0], {"logits": names[1]})


@pytest.mark.parametrize("engine", SUFFIXES)
def test_runner_returns_tokens_and_gmacs_of_each_image(folder: Path, engine: str) -> None:
    runner = open_backend(engine, OPTIONS).load(folder / f"atm.{SUFFIXES[engine]}", "pixels", ALL)
    pixels = np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    pixels[0] //= 8
    answer, (tokens, gmacs) = runner.run(pixels), expected_costs(pixels)
    np.testing.assert_allclose(answer["logits"], expected_logits(pixels, ATM_BIAS), atol=1e-5)
    np.testing.assert_array_equal(answer["tokens"], tokens)
    np.testing.assert_allclose(answer["gmacs"], gmacs, rtol=1e-6)
    assert answer["tokens"].dtype == np.int64
    assert tokens[0, -1] != tokens[1, -1]


def test_torchscript_refuses_another_number_of_outputs(folder: Path) -> None:
    runner = open_backend("torchscript", OPTIONS).load(folder / "tome-r8.pt", "pixels", ALL)
    with pytest.raises(BackendError, match="the graph has 1 outputs, expected 3"):
        runner.run(np.zeros((1, SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize("engine", SUFFIXES)
def test_open_backend_refuses_a_missing_device(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match="CUDA"):
        open_backend(engine, BackendOptions("cuda", 1, share_weights=False))


def test_onnx_load_refuses_a_silent_fallback_to_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(BackendError, match="fell back from CPUExecutionProvider to OtherExecutionProvider"):
        open_backend("onnxruntime", OPTIONS).load(folder / "tome-r8.onnx", "pixels", LOGITS)


@pytest.mark.parametrize(("engine", "package"), [("onnxruntime", "onnxruntime"), ("torchscript", "torch")])
def test_open_backend_names_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.delitem(sys.modules, ENGINES[engine].module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"{engine} is not installed.*{package}"):
        open_backend(engine, OPTIONS)


class AddRowNumbers(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels + torch.arange(pixels.shape[0], device=pixels.device).unsqueeze(1)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torchscript_moves_device_constants() -> None:
    traced = torch.jit.trace(AddRowNumbers(), torch.zeros(2, 3))  # type: ignore[no-untyped-call]
    move_constants(traced, torch.device("cuda:1"))
    assert 'Device = prim::Constant[value="cuda:1"]' in str(traced.graph)
    assert '"cpu"' not in str(traced.graph)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", SUFFIXES)
def test_runner_computes_the_same_on_cuda(folder: Path, engine: str) -> None:
    if engine == "onnxruntime" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    backend = open_backend(engine, BackendOptions("cuda", 1, share_weights=False))
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    runner = backend.load(folder / f"tome-r8.{SUFFIXES[engine]}", "pixels", LOGITS)
    np.testing.assert_allclose(runner.run(pixels)["logits"], expected_logits(pixels, 8), atol=1e-4)
    adaptive = backend.load(folder / f"atm.{SUFFIXES[engine]}", "pixels", ALL)
    np.testing.assert_array_equal(adaptive.run(pixels)["tokens"], expected_costs(pixels)[0])
