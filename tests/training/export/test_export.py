import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.manifest import Manifest
from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.cli import export
from training.cli.model_options import add_model_options, chosen_model
from training.data.digits import draw
from training.data.preprocessing import InputRule
from training.evaluate import accuracy
from training.export import parity
from training.export import publish as publishing
from training.export.manifest import git_commit
from training.export.onnx_format import OnnxClassifier, export_onnx
from training.export.parity import Decisions, ParityError, decisions, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier
from training.export.weights import tensor_places
from training.models.classifier import ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.macs import matching_macs, vit_macs
from training.models.vit import MergingVisionTransformer, load_vit
from training.models.weights import save_weights

RATES = (0, 8, 32)
GRAPHS = [("none", 0), *((policy, r) for policy in ("tome", "dtem") for r in RATES if r)]
RULE = InputRule(height=112, width=112, resize_shorter_side=124, mean=(0.5,) * 3, std=(0.5,) * 3)  # as timm has it


def embedding() -> DecoupledEmbedding:
    torch.manual_seed(5)
    return DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=16, recipe="some.toml"))


def frozen(policy: str, r: int) -> ServedClassifier:
    return frozen_classifier(tiny_vit(), RULE, r, metric=embedding() if policy == "dtem" else "keys")


def command(folder: Path) -> list[str]:
    if not (folder / "weights.safetensors").exists():
        save_file(tiny_vit().state_dict(), folder / "weights.safetensors")
        embedding().save(folder / "own.safetensors")
        (folder / "store").mkdir()
        shutil.copy("model_store/manifest.schema.json", folder / "store")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(folder / "weights.safetensors")]
    data = ["--arguments", json.dumps(ARGUMENTS), "--n-images", "300", "--rates", ",".join(map(str, RATES))]
    return [*model, *data, "--name", "tiny", "--store", str(folder / "store")]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    with_embedding = ["--embedding", str(folder / "own.safetensors")]
    assert export.main([*command(folder), *with_embedding, "--formats", "onnx,torchscript"]) == 0
    return folder / "store" / "tiny" / "1"


@pytest.fixture(scope="module")
def manifest(published: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((published / "manifest.json").read_text())
    return content


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.stack([torch.from_numpy(draw("validation", index).image) for index in range(200)])


def test_manifest_is_what_the_service_reads(published: Path) -> None:
    manifest = Manifest.model_validate_json((published / "manifest.json").read_bytes())
    assert manifest.name == "tiny"
    assert (manifest.default.policy, manifest.default.r) == ("dtem", 8)
    assert manifest.embedding is not None
    assert manifest.embedding.model_dump() == {
        "file": "embedding.safetensors",
        "dim": 8,
        "r": 16,
        "recipe": "some.toml",
    }
    found = {(v.policy, v.r, v.format) for v in manifest.variants}
    offered = [("none", 0), *((policy, r) for policy in ("tome", "dtem") for r in RATES)]
    assert found == {(policy, r, form) for form in ("onnx", "torchscript") for policy, r in offered}


def test_unmerged_graph_is_one_under_every_policys_name(manifest: dict[str, Any]) -> None:
    files = {v["file"] for v in manifest["variants"] if v["r"] == 0 and v["format"] == "onnx"}
    assert files == {"none-r0.onnx"}
    assert {v["policy"] for v in manifest["variants"] if v["r"] == 0} == {"none", "tome", "dtem"}


def test_embedding_is_published_beside_the_model_and_found_there(published: Path) -> None:
    options = argparse.ArgumentParser()
    add_model_options(options)
    chosen = chosen_model(options.parse_args(["--published", str(published)]))
    assert chosen.embedding is not None
    assert chosen.embedding.config == embedding().config
    own = dict(embedding().named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in chosen.embedding.named_parameters())
    assert all(torch.equal(tensor, chosen.vit.state_dict()[name]) for name, tensor in tiny_vit().state_dict().items())


def test_every_file_is_listed_with_its_digest(published: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: path for path in published.iterdir() if path.name != "manifest.json"}
    assert files.keys() == manifest["files"].keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["files"][name]["sha256"]
        assert path.stat().st_mode & 0o444 == 0o444


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


def test_rows_that_do_not_lie_together_are_no_place(tmp_path: Path) -> None:
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
    batch = parity_pixels(classifier, pixels, n_images)
    stem = f"{policy}-r{r}"
    if r:
        assert decisions(classifier, batch).sharing.min() > 0, "no destination is shared: the test would prove little"
    for exported in (OnnxClassifier(published / f"{stem}.onnx"), TorchScriptClassifier(published / f"{stem}.pt")):
        assert largest_difference(classifier, exported, batch, (n_images,)) < 1e-4


def test_joined_classifier_equals_the_embedding_apart(pixels: Tensor) -> None:
    joined = frozen("dtem", 32)
    assert joined.model.joined is not None
    apart = ServedClassifier(
        MergingVisionTransformer(tiny_vit(), 32, exhausted="reduce", metric=embedding(), attention="plain"), RULE
    )
    batch = parity_pixels(joined, pixels, 8)
    with torch.no_grad():
        assert float((joined(batch) - apart(batch)).abs().max()) < 1e-4
        assert float((joined(batch) - frozen("tome", 32)(batch)).abs().max()) > 1e-3  # it does merge otherwise


def test_batch_is_the_only_dynamic_axis(published: Path) -> None:
    for file in published.glob("*.onnx"):
        session = onnxruntime.InferenceSession(file)
        (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (pixels.name, pixels.type, pixels.shape[1:]) == ("pixels", "tensor(uint8)", [112, 112, 3])
        assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [10])
        assert isinstance(pixels.shape[0], str)


def test_an_image_is_classified_alike_in_any_company(published: Path, pixels: Tensor) -> None:
    exported = OnnxClassifier(published / "tome-r32.onnx")
    clear = parity_pixels(frozen_classifier(tiny_vit(), RULE, 32), pixels, 16)
    together = exported(clear)
    alone = torch.cat([exported(clear[i : i + 1]) for i in range(len(clear))])
    assert torch.allclose(together, alone, atol=1e-4)


def test_golden_outputs_are_those_of_every_variant(published: Path, manifest: dict[str, Any]) -> None:
    golden = np.load(published / "golden.npz")
    for variant in manifest["variants"]:
        run = OnnxClassifier if variant["format"] == "onnx" else TorchScriptClassifier
        logits = run(published / variant["file"])(torch.from_numpy(golden["pixels"])).numpy()
        expected = golden[f"logits/{variant['policy']}-r{variant['r']}"]
        assert np.abs(logits - expected).max() < manifest["golden"]["atol"]


def test_gmacs_and_tokens_agree_with_the_closed_formula(manifest: dict[str, Any]) -> None:
    for variant in manifest["variants"]:
        dim = 8 if variant["policy"] == "dtem" else None
        matching = matching_macs(tiny_vit(), variant["schedule"], embedding_dim=dim)
        formula = vit_macs(tiny_vit(), variant["schedule"]) + matching
        assert variant["gmacs"] == pytest.approx(formula / 1e9, rel=1e-12)
        assert variant["tokens"][-1] == 197 - sum(variant["schedule"])


def test_accuracy_is_measured_on_the_graph(published: Path, manifest: dict[str, Any]) -> None:
    exported = OnnxClassifier(published / "tome-r8.onnx")
    scenes = [draw("test", index) for index in range(300)]
    logits = exported(torch.stack([torch.from_numpy(scene.image) for scene in scenes]))
    n_right = sum(int(found) == scene.label for found, scene in zip(logits.argmax(1), scenes, strict=True))
    (variant,) = [v for v in manifest["variants"] if v["id"] == "tome-r8-float32-onnx"]
    assert variant["accuracy"]["top1"] == n_right / 300
    assert variant["accuracy"]["n_images"] == 300


def test_published_version_is_never_changed(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (published / "manifest.json").read_bytes()
    assert export.main([*command(published.parents[2]), "--version", "1"]) == 2
    assert "immutable" in capsys.readouterr().err
    assert (published / "manifest.json").read_bytes() == before


def test_graph_that_differs_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = OnnxClassifier.__call__
    monkeypatch.setattr(OnnxClassifier, "__call__", lambda graph, pixels: run(graph, pixels) + 2e-4)
    assert export.main(command(tmp_path)) == 2
    assert "none-r0.onnx: differs from eager by 2.0" in capsys.readouterr().err
    assert not (tmp_path / "store" / "tiny" / "1").exists()


def test_wrong_answer_at_one_batch_size_is_found(pixels: Tensor) -> None:
    classifier = frozen_classifier(tiny_vit(), RULE, 8)
    batch = parity_pixels(classifier, pixels, 32)

    def wrong_at_two(images: Tensor) -> Tensor:
        logits: Tensor = classifier(images)
        return logits.flip(0) if len(images) == 2 else logits

    with torch.no_grad():
        assert largest_difference(classifier, classifier, batch) == 0
        assert largest_difference(classifier, wrong_at_two, batch) > 0.01


def test_interrupted_export_resumes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = accuracy.measure

    def counting(*arguments: Any, **settings: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments, **settings)

    monkeypatch.setattr(publishing, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        export.main(command(tmp_path))
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == [".1.unfinished"]
    measured.pop()
    assert export.main(command(tmp_path)) == 0
    assert len(measured) == 2  # of three rates two were known
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == ["1"]


def test_decisions_are_made_once_for_each_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []

    def counting(classifier: ServedClassifier, pixels: Tensor) -> Decisions:
        decided.append(classifier.model.schedule[0])
        return decisions(classifier, pixels)

    monkeypatch.setattr(publishing, "decisions", counting)
    monkeypatch.setattr(parity, "decisions", counting)
    assert export.main([*command(tmp_path), "--rates", "8", "--formats", "torchscript"]) == 0
    assert decided == [8]


def test_export_resumed_with_another_plan_leaves_no_file_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [*command(tmp_path), "--formats", "torchscript"]  # the quicker ones to make
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export.main([*plan, "--rates", "8", "--embedding", str(tmp_path / "own.safetensors")])
    (work,) = (tmp_path / "store" / "tiny").iterdir()
    assert {path.name for path in work.glob("*.pt")} == {"tome-r8.pt", "dtem-r8.pt"}
    assert export.main([*plan, "--rates", "4", "--default-r", "4"]) == 0
    folder = tmp_path / "store" / "tiny" / "1"
    expected = {"golden.npz", "tome-r4.pt", "weights.safetensors"}
    assert {path.name for path in folder.iterdir()} == expected | {"manifest.json"}
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == expected
    assert not [name for name in load_file(folder / "weights.safetensors") if "embedding" in name]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_export_outside_a_git_checkout_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"no git checkout.*export from a clone"):
        git_commit(tmp_path)
    monkeypatch.setattr(publishing, "git_commit", lambda: git_commit(tmp_path))
    assert export.main(command(tmp_path)) == 2
    assert f"export refused: {tmp_path} is in no git checkout" in capsys.readouterr().err
    assert not (tmp_path / "store" / "tiny").exists()


def test_images_without_clear_decisions_prove_nothing_and_are_refused() -> None:
    flat = torch.zeros(40, 112, 112, 3, dtype=torch.uint8)
    vit: Any = tiny_vit()
    with torch.no_grad():
        vit.pos_embed.zero_()  # every token is the same: all scores tie
    with pytest.raises(ParityError, match="only 0 of 40"):
        parity_pixels(frozen_classifier(vit, RULE, 8), flat, 1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--default-r", "4"], "default_r 4"),
        (["--default-policy", "dtem"], "default_policy dtem: expected one of none, tome"),
        (["--default-policy", "none"], "default_r 8: expected one of [0], the rates of policy none"),
        (["--rates", "8,8"], "rates [8, 8]"),
        (["--formats", "onnx,tensorrt"], "tensorrt"),
        (["--rates", "8,150"], "cannot remove r=150"),
        (["--architecture", "swin_tiny_patch4_window7_224", "--arguments", "{}"], "window"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([*command(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err
