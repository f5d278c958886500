import hashlib
import json
import shutil
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
from training.data.digits import draw
from training.data.preprocessing import InputRule
from training.evaluate import accuracy
from training.export import publish as publishing
from training.export.onnx_format import OnnxClassifier
from training.export.parity import ParityError, decisions, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier
from training.models.classifier import frozen_classifier
from training.models.macs import matching_macs, vit_macs

RATES = (0, 8, 32)
RULE = InputRule(height=112, width=112, resize_shorter_side=124, mean=(0.5,) * 3, std=(0.5,) * 3)  # as timm has it


def command(folder: Path) -> list[str]:
    if not (folder / "weights.safetensors").exists():
        save_file(tiny_vit().state_dict(), folder / "weights.safetensors")
        (folder / "store").mkdir()
        shutil.copy("model_store/manifest.schema.json", folder / "store")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(folder / "weights.safetensors")]
    data = ["--arguments", json.dumps(ARGUMENTS), "--n-images", "300", "--rates", ",".join(map(str, RATES))]
    return [*model, *data, "--name", "tiny", "--store", str(folder / "store")]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert export.main([*command(folder), "--formats", "onnx,torchscript"]) == 0
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
    assert manifest.default.r == 8
    found = {(v.policy, v.r, v.format) for v in manifest.variants}
    expected = {(p, r, f) for f in ("onnx", "torchscript") for p, r in [("none", 0), *(("tome", r) for r in RATES)]}
    assert found == expected


def test_every_file_is_listed_with_its_digest(published: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: path for path in published.iterdir() if path.name != "manifest.json"}
    assert files.keys() == manifest["files"].keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["files"][name]["sha256"]
        assert path.stat().st_mode & 0o444 == 0o444


def test_rates_share_one_weights_file_which_pytorch_reads_too(published: Path) -> None:
    state = load_file(published / "weights.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_vit().state_dict().items())
    for file in published.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False)
        external = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
            "weights.safetensors"
        }
        inline = sum(len(t.raw_data) for t in graph.graph.initializer)
        assert inline < 0.1 * (published / "weights.safetensors").stat().st_size
        assert graph.opset_import[0].version >= 18


@pytest.mark.parametrize("r", RATES)
@pytest.mark.parametrize("n_images", [1, 2, 5, 32])
def test_graphs_equal_eager_at_any_batch(published: Path, pixels: Tensor, r: int, n_images: int) -> None:
    classifier = frozen_classifier(tiny_vit(), RULE, r)
    batch = parity_pixels(classifier, pixels, n_images)
    stem = f"tome-r{r}" if r else "none-r0"
    if r:
        assert decisions(classifier, batch).sharing.min() > 0, "no destination is shared: the test would prove little"
    for exported in (OnnxClassifier(published / f"{stem}.onnx"), TorchScriptClassifier(published / f"{stem}.pt")):
        assert largest_difference(classifier, exported, batch, (n_images,)) < 1e-4


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
        formula = vit_macs(tiny_vit(), variant["schedule"]) + matching_macs(tiny_vit(), variant["schedule"])
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
