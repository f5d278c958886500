import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from app.backends import BackendOptions, open_backend
from app.backends.torchscript import move_constants
from app.errors import BackendError
from tests.app.conftest import OPTIONS
from tests.app.tiny_store import ATM_BIAS, SIDE, expected_costs, expected_logits, write_store

FORMATS = {"onnx": "onnx", "torchscript": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("both"), formats=("onnx", "torchscript"))


@pytest.mark.parametrize("graph_format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_runner_computes_the_graph_for_any_batch(folder: Path, graph_format: str, batch: int) -> None:
    runner = open_backend(graph_format, OPTIONS).load(folder / f"tome-r8.{FORMATS[graph_format]}", "pixels", ["logits"])
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)
    pixels.flags.writeable = False
    logits = runner.run(pixels).logits
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(pixels, 8), atol=1e-5)


def test_onnx_with_shared_weights_computes_the_same(folder: Path) -> None:
    pixels = np.full((1, SIDE, SIDE, 3), 77, np.uint8)
    options = BackendOptions("cpu", 2, share_weights=True)
    runner = open_backend("onnx", options).load(folder / "tome-r8.onnx", "pixels", ["logits"])
    np.testing.assert_allclose(runner.run(pixels).logits, expected_logits(pixels, 8), atol=1e-5)


@pytest.mark.parametrize("graph_format", FORMATS)
def test_load_translates_errors_of_the_engine(tmp_path: Path, graph_format: str) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError) as caught:
        open_backend(graph_format, OPTIONS).load(path, "pixels", ["logits"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("graph_format", FORMATS)
def test_run_translates_errors_of_the_engine(folder: Path, graph_format: str) -> None:
    runner = open_backend(graph_format, OPTIONS).load(folder / f"tome-r8.{FORMATS[graph_format]}", "pixels", ["logits"])
    with pytest.raises(BackendError):
        runner.run(np.zeros((1, 2, 3), np.uint8))


@pytest.mark.parametrize(("names", "word"), [(("image", "logits"), "input"), (("pixels", "scores"), "output")])
def test_onnx_load_refuses_a_graph_with_other_names(folder: Path, names: tuple[str, str], word: str) -> None:
    with pytest.raises(BackendError, match=f"no {word}"):
        open_backend("onnx", OPTIONS).load(folder / "tome-r8.onnx", names[0], [names[1]])


@pytest.mark.parametrize("graph_format", FORMATS)
def test_runner_says_what_each_image_kept_and_cost(folder: Path, graph_format: str) -> None:
    names = ["logits", "tokens", "gmacs"]
    runner = open_backend(graph_format, OPTIONS).load(folder / f"atm.{FORMATS[graph_format]}", "pixels", names)
    pixels = np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    pixels[0] //= 8
    answer, (tokens, gmacs) = runner.run(pixels), expected_costs(pixels)
    assert answer.tokens is not None
    assert answer.gmacs is not None
    np.testing.assert_allclose(answer.logits, expected_logits(pixels, ATM_BIAS), atol=1e-5)
    np.testing.assert_array_equal(answer.tokens, tokens)
    np.testing.assert_allclose(answer.gmacs, gmacs, rtol=1e-6)
    assert answer.tokens.dtype == np.int64
    assert tokens[0, -1] != tokens[1, -1]


def test_torchscript_refuses_another_number_of_outputs(folder: Path) -> None:
    runner = open_backend("torchscript", OPTIONS).load(folder / "tome-r8.pt", "pixels", ["logits", "tokens", "gmacs"])
    with pytest.raises(BackendError, match="1 outputs instead of 3"):
        runner.run(np.zeros((1, SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize("graph_format", FORMATS)
def test_open_backend_refuses_a_device_that_is_not_there(graph_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match="CUDA"):
        open_backend(graph_format, BackendOptions("cuda", 1, share_weights=False))


def test_onnx_load_refuses_a_silent_fallback_to_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(BackendError, match="did not take CPUExecutionProvider"):
        open_backend("onnx", OPTIONS).load(folder / "tome-r8.onnx", "pixels", ["logits"])


@pytest.mark.parametrize(("graph_format", "engine"), [("onnx", "onnxruntime"), ("torchscript", "torch")])
def test_open_backend_says_which_engine_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, graph_format: str, engine: str
) -> None:
    monkeypatch.delitem(sys.modules, f"app.backends.{graph_format}", raising=False)
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(BackendError, match=engine):
        open_backend(graph_format, OPTIONS)


class Counting(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels + torch.arange(pixels.shape[0], device=pixels.device).unsqueeze(1)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torchscript_moves_what_a_graph_makes_itself() -> None:
    traced = torch.jit.trace(Counting(), torch.zeros(2, 3))  # type: ignore[no-untyped-call]
    move_constants(traced, torch.device("cuda:1"))
    assert 'Device = prim::Constant[value="cuda:1"]' in str(traced.graph)
    assert '"cpu"' not in str(traced.graph)


@pytest.mark.gpu
@pytest.mark.parametrize("graph_format", FORMATS)
def test_runner_computes_the_same_on_cuda(folder: Path, graph_format: str) -> None:
    if graph_format == "onnx" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    options, extension = BackendOptions("cuda", 1, share_weights=False), FORMATS[graph_format]
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    runner = open_backend(graph_format, options).load(folder / f"tome-r8.{extension}", "pixels", ["logits"])
    np.testing.assert_allclose(runner.run(pixels).logits, expected_logits(pixels, 8), atol=1e-4)
    names = ["logits", "tokens", "gmacs"]
    adaptive = open_backend(graph_format, options).load(folder / f"atm.{extension}", "pixels", names)
    np.testing.assert_array_equal(adaptive.run(pixels).tokens, expected_costs(pixels)[0])
