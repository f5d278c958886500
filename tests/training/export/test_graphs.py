"""Each exported graph computes what eager PyTorch does, on weights that all of them share."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.export.tiny_export import (
    GRAPHS,
    RULE,
    clear,
    embedding,
    frozen,
    frozen_adaptive,
    largest_difference,
)
from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.export.onnx_format import OnnxClassifier, export_onnx
from training.export.parity import parity_pixels
from training.export.plan import Plan
from training.export.publish import plan_formats
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.export.weights import tensor_places
from training.merging.adaptive import Thresholds
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.classifier import AdaptiveClassifier, ServedClassifier, frozen_classifier
from training.models.vit import MergingVisionTransformer, load_vit
from training.models.weights import save_weights

# The fixture `published` exports graphs for minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


def test_graphs_share_one_weights_file_which_pytorch_reads_too(published: Path) -> None:
    state = load_file(published / "weights.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_vit().state_dict().items())
    for file in published.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False)
        external = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
            "weights.safetensors"
        }
        inline = [t for t in graph.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        matrices_inline = [t.name for t in inline if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]
        assert not matrices_inline
        assert sum(len(t.raw_data) for t in inline) < 0.1 * (published / "weights.safetensors").stat().st_size
        assert graph.opset_import[0].version >= 18


def matrices(graph: onnx.ModelProto, n_rows: int) -> list[dict[str, str]]:
    found = [t for t in graph.graph.initializer if list(t.dims) == [n_rows, 32]]
    return [{entry.key: entry.value for entry in tensor.external_data} for tensor in found]


@pytest.mark.parametrize("r", [8, 32])
def test_embedding_is_rows_of_the_qkv_gemm_and_tome_uses_a_prefix_of_it(published: Path, r: int) -> None:
    tome, dtem = (onnx.load(published / f"{policy}-r{r}.onnx", load_external_data=False) for policy in ("tome", "dtem"))
    assert len(matrices(dtem, 3 * 32 + 8)) == len(matrices(tome, 3 * 32)) == 3
    for joined, plain in zip(matrices(dtem, 3 * 32 + 8), matrices(tome, 3 * 32), strict=True):
        assert joined["offset"] == plain["offset"]
        assert int(joined["length"]) - int(plain["length"]) == 8 * 32 * 4
    count = {
        name: Counter(node.op_type for node in graph.graph.node) for name, graph in zip("td", (tome, dtem), strict=True)
    }
    for kind in ("Gemm", "MatMul", "Split", "Gather", "Concat", "Slice", "Add", "Softmax", "TopK"):
        assert count["d"][kind] == count["t"][kind], kind
    assert count["d"]["ReduceMean"] == count["t"]["ReduceMean"] - 3  # no keys to average
    assert sum(count["d"].values()) <= sum(count["t"].values()) + 3 * 5  # q, k, v are each reshaped and transposed


def test_joined_bias_of_a_vit_without_one_is_in_the_graph_and_its_weights_are_not(tmp_path: Path) -> None:
    torch.manual_seed(11)
    vit = load_vit("vit_tiny_patch16_224", qkv_bias=False, **ARGUMENTS).eval()
    save_weights(vit, embedding(), tmp_path / "weights.safetensors")
    classifier = frozen_classifier(vit, RULE, 8, metric=embedding())
    pixels = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    export_onnx(classifier, pixels, tmp_path / "dtem.onnx", tmp_path / "weights.safetensors")
    graph = onnx.load(tmp_path / "dtem.onnx", load_external_data=False)
    assert all(place["location"] == "weights.safetensors" for place in matrices(graph, 3 * 32 + 8))
    assert largest_difference(classifier, OnnxClassifier(tmp_path / "dtem.onnx"), pixels, (2,)) < 1e-4


def test_rows_that_are_not_adjacent_have_no_range(tmp_path: Path) -> None:
    weight, rows = torch.randn(4, 3), torch.randn(2, 3)
    together = {"qkv.weight": weight, "qkv.weight_embedding": rows}
    joined = torch.cat([weight, rows]).numpy().tobytes()
    save_file(together, tmp_path / "together.safetensors")
    save_file({**together, "qkv.weight_a": torch.randn(5)}, tmp_path / "apart.safetensors")
    place = tensor_places(tmp_path / "together.safetensors")[joined]
    assert (tmp_path / "together.safetensors").read_bytes()[place.offset :][: place.length] == joined
    apart = tensor_places(tmp_path / "apart.safetensors")
    assert joined not in apart
    assert weight.numpy().tobytes() in apart


@pytest.mark.parametrize(("policy", "r"), GRAPHS)
@pytest.mark.parametrize("n_images", [1, 2, 5, 32])
def test_graphs_equal_eager_at_any_batch(published: Path, pixels: Tensor, policy: str, r: int, n_images: int) -> None:
    classifier = frozen(policy, r)
    batch = clear(classifier, pixels, n_images)
    stem = f"{policy}-r{r}"
    for exported in (OnnxClassifier(published / f"{stem}.onnx"), TorchScriptClassifier(published / f"{stem}.pt")):
        assert largest_difference(classifier, exported, batch, (n_images,)) < 1e-4


@pytest.mark.parametrize("policy", ["atm", "adaptive-dtem"])
@pytest.mark.parametrize("n_images", [1, 2, 5, 32])
def test_adaptive_graphs_equal_eager_at_any_batch(published: Path, pixels: Tensor, policy: str, n_images: int) -> None:
    classifier = frozen_adaptive(policy)
    batch = parity_pixels(classifier, clear(classifier, pixels, len(pixels)), 32)  # most and fewest GMACs first
    with torch.no_grad():
        _, tokens, gmacs = classifier(batch)
    assert gmacs[0] > 1.5 * gmacs[1]
    assert gmacs[0] == gmacs.max()
    for exported in (OnnxClassifier(published / f"{policy}.onnx"), TorchScriptClassifier(published / f"{policy}.pt")):
        assert largest_difference(classifier, exported, batch, (n_images,)) < 1e-4
        single = [exported(batch[index : index + 1]) for index in range(n_images)]
        logits, kept, cost = exported(batch[:n_images])
        assert torch.equal(kept, tokens[:n_images])
        assert torch.equal(kept, torch.cat([one[1] for one in single]))
        assert torch.equal(cost, torch.cat([one[2] for one in single]))
        torch.testing.assert_close(logits, torch.cat([one[0] for one in single]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("limit", [-2.0, 0.99999])
@pytest.mark.parametrize("split_depth", [0, 3])
def test_graph_that_merges_all_it_can_and_one_that_merges_nothing(
    tmp_path: Path, pixels: Tensor, limit: float, split_depth: int
) -> None:
    model = AdaptiveVisionTransformer(tiny_vit(), Thresholds(limit, 0.0, limit, split_depth), metric="features")
    classifier = AdaptiveClassifier(model, RULE).eval()
    noise = torch.randint(0, 256, (4, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_weights(tiny_vit(), None, tmp_path / "weights.safetensors")
    export_onnx(classifier, noise[:2], tmp_path / "atm.onnx", tmp_path / "weights.safetensors")
    export_torchscript(classifier, noise[:2], tmp_path / "atm.pt")
    for exported in (OnnxClassifier(tmp_path / "atm.onnx"), TorchScriptClassifier(tmp_path / "atm.pt")):
        assert largest_difference(classifier, exported, noise, (1, 2, 4)) < 1e-4
        kept = exported(noise)[1]
        assert (kept[:, 1:] == (kept[:, :1] if limit > 0 else torch.tensor([99, 50, 26]))).all()


def test_adaptive_graph_exported_again_has_the_same_bytes(published: Path, pixels: Tensor, tmp_path: Path) -> None:
    """Resumed exports and new versions reuse the measurements of identical files."""
    classifier = frozen_adaptive("atm")
    example = clear(classifier, pixels, 2)
    shutil.copy(published / "weights.safetensors", tmp_path)
    export_onnx(classifier, example, tmp_path / "atm.onnx", tmp_path / "weights.safetensors")
    assert (tmp_path / "atm.onnx").read_bytes() == (published / "atm.onnx").read_bytes()


def test_joined_classifier_equals_the_embedding_apart(pixels: Tensor) -> None:
    joined = frozen("dtem", 32)
    assert joined.model.joined is not None
    apart = ServedClassifier(
        MergingVisionTransformer(tiny_vit(), 32, exhausted="reduce", metric=embedding(), attention="plain"), RULE
    )
    batch = clear(joined, pixels, 8)
    with torch.no_grad():
        assert float((joined(batch) - apart(batch)).abs().max()) < 1e-4
        assert float((joined(batch) - frozen("tome", 32)(batch)).abs().max()) > 1e-3  # it does merge otherwise


def test_batch_is_the_only_dynamic_axis(published: Path) -> None:
    for file in published.glob("*.onnx"):
        session = onnxruntime.InferenceSession(file)
        (pixels,), (logits, *costs) = session.get_inputs(), session.get_outputs()
        assert (pixels.name, pixels.type, pixels.shape[1:]) == ("pixels", "tensor(uint8)", [112, 112, 3])
        assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [10])
        assert isinstance(pixels.shape[0], str)
        if costs:
            kinds = [(cost.name, cost.type, cost.shape[1:]) for cost in costs]
            assert kinds == [("tokens", "tensor(int64)", [4]), ("gmacs", "tensor(float)", [])]


def test_graph_is_batch_invariant(published: Path, pixels: Tensor) -> None:
    exported = OnnxClassifier(published / "tome-r32.onnx")
    images = clear(frozen_classifier(tiny_vit(), RULE, 32), pixels, 16)
    batch = exported(images)
    single = torch.cat([exported(images[i : i + 1]) for i in range(len(images))])
    assert torch.allclose(batch, single, atol=1e-4)


def test_graph_format_is_refused_on_a_device_that_it_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    plan = Plan("mine", "1", (0, 8), device="cuda", formats=("torchscript", "onnx"))
    with pytest.raises(ValueError, match="--device cuda: ONNX Runtime has no CUDAExecutionProvider"):
        plan_formats(plan)
    assert [one.name for one in plan_formats(replace(plan, formats=("torchscript",)))] == ["torchscript"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torchscript_is_measured_on_a_gpu(tmp_path: Path) -> None:
    module = frozen_classifier(tiny_vit(), RULE, 16)
    export_torchscript(module, torch.zeros(2, 112, 112, 3, dtype=torch.uint8), tmp_path / "graph.pt")
    pixels = torch.randint(0, 256, (4, 112, 112, 3), dtype=torch.uint8)
    found = TorchScriptClassifier(tmp_path / "graph.pt", device="cuda")(pixels)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, module(pixels), rtol=1e-3, atol=1e-3)
