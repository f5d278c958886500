"""The published version: what it holds, and what is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from app.store.manifest import Manifest
from dtem import training
from tests.training.commands import dtem
from tests.training.export.tiny_export import RATES, command, embedding, frozen_adaptive
from tests.training.tiny_vit import tiny_vit
from training.cli.model_options import chosen_model
from training.cli.options import ModelOptions
from training.data.digits import draw
from training.evaluate import accuracy
from training.evaluate.results import read_evaluation
from training.export import manifest as written
from training.export import measured as measured_rows
from training.export import publish as publishing
from training.export.onnx_format import OnnxClassifier
from training.export.torchscript_format import TorchScriptClassifier
from training.models.calibration import load_calibration
from training.models.macs import matching_macs, vit_macs
from training.models.variants import variant_key
from training.provenance import git_commit

# The fixture `published` exports graphs for minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


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
    fixed = [("none", 0), *((policy, r) for policy in ("tome", "dtem") for r in RATES)]
    offered: list[tuple[str, int | None]] = [*fixed, ("atm", None), ("adaptive-dtem", None)]
    assert found == {(policy, r, form) for form in ("onnx", "torchscript") for policy, r in offered}


def test_unmerged_graph_is_one_under_every_policys_name(manifest: dict[str, Any]) -> None:
    files = {v["file"] for v in manifest["variants"] if v["r"] == 0 and v["format"] == "onnx"}
    assert files == {"none-r0.onnx"}
    assert {v["policy"] for v in manifest["variants"] if v["r"] == 0} == {"none", "tome", "dtem"}


def test_embedding_is_published_with_the_model_and_found_there(published: Path) -> None:
    chosen = chosen_model(ModelOptions(published=published))
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


def test_golden_outputs_are_those_of_every_variant(published: Path, manifest: dict[str, Any]) -> None:
    golden = np.load(published / "golden.npz")
    for variant in manifest["variants"]:
        run = OnnxClassifier if variant["format"] == "onnx" else TorchScriptClassifier
        answer = run(published / variant["file"])(torch.from_numpy(golden["pixels"]))
        key = variant_key(variant["policy"], variant["r"])
        if variant["data_dependent"]:
            answer, tokens, gmacs = answer
            assert np.array_equal(tokens, golden[f"tokens/{key}"])
            assert np.allclose(gmacs, golden[f"gmacs/{key}"], rtol=1e-6)
        assert np.abs(answer.numpy() - golden[f"logits/{key}"]).max() < manifest["golden"]["atol"]


def test_gmacs_and_tokens_agree_with_the_closed_formula(manifest: dict[str, Any]) -> None:
    for variant in manifest["variants"]:
        if variant["data_dependent"]:
            continue
        dim = 8 if variant["policy"] == "dtem" else None
        matching = matching_macs(tiny_vit(), variant["schedule"], embedding_dim=dim)
        formula = vit_macs(tiny_vit(), variant["schedule"]) + matching
        assert variant["gmacs"] == pytest.approx(formula / 1e9, rel=1e-12)
        assert variant["tokens"][-1] == 197 - sum(variant["schedule"])


def test_accuracy_is_measured_on_the_graph(published: Path, manifest: dict[str, Any]) -> None:
    exported = OnnxClassifier(published / "tome-r8.onnx")
    scenes = [draw("test", index) for index in range(300)]
    pixels = torch.stack([torch.from_numpy(scene.image) for scene in scenes])
    # Batches as in the measurement: a decision may depend on the batch by rounding.
    logits = torch.cat([exported(batch) for batch in torch.split(pixels, measured_rows.BATCH_SIZE)])
    n_right = sum(int(found) == scene.label for found, scene in zip(logits.argmax(1), scenes, strict=True))
    (variant,) = [v for v in manifest["variants"] if v["id"] == "tome-r8-float32-onnx"]
    assert variant["accuracy"]["top1"] == n_right / 300
    assert variant["accuracy"]["n_images"] == 300


def test_published_version_is_never_changed(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (published / "manifest.json").read_bytes()
    assert dtem("export", [*command(published.parents[2]), "--version", "1"]) == 2
    assert "immutable" in capsys.readouterr().err
    assert (published / "manifest.json").read_bytes() == before


def test_graph_that_differs_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = OnnxClassifier.__call__
    monkeypatch.setattr(OnnxClassifier, "__call__", lambda graph, pixels: run(graph, pixels) + 2e-4)
    assert dtem("export", command(tmp_path)) == 2
    assert "none-r0.onnx: batch 1, without scores: differs from eager by 2.0" in capsys.readouterr().err
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.usefixtures("quick_format")
def test_interrupted_export_keeps_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = accuracy.measure

    def counting(*arguments: Any, **settings: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments, **settings)

    monkeypatch.setattr(measured_rows, "measure", counting)
    assert dtem("export", command(tmp_path)) == 130
    work = tmp_path / "store" / "tiny" / ".1.unfinished"
    assert [path.name for path in work.parent.iterdir()] == [work.name]
    assert [path.name for path in work.iterdir()] == ["measurements.json"], "a copy of the weights is left"
    measured.pop()
    assert dtem("export", command(tmp_path)) == 0
    assert len(measured) == 2  # of three rates two were known
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == ["1"]


@pytest.mark.usefixtures("quick_format")
def test_interrupted_export_keeps_the_gmacs_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [*command(tmp_path), "--calibrations", str(tmp_path / "atm.json"), "--rates", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_evaluation", interrupt)
        assert dtem("export", plan) == 130
    work = tmp_path / "store" / "tiny" / ".1.unfinished"
    (_, entry), *_ = sorted(
        json.loads((work / "measurements.json").read_text()).items(), key=lambda item: item[1][0]["policy"]
    )
    monkeypatch.setattr(measured_rows, "measure", interrupt)
    assert dtem("export", plan) == 0
    variants = json.loads((work.with_name("1") / "manifest.json").read_text())["variants"]
    (atm,) = [variant for variant in variants if variant["policy"] == "atm"]
    assert [atm["gmacs"], *atm["gmacs_spread"].values()] == [
        entry[0][name] for name in ("gmacs", "gmacs_p5", "gmacs_p95")
    ]
    assert atm["tokens"] == [round(count) for count in entry[2]]


def test_measurements_of_identical_files_are_taken_from_the_published_version(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(published, store / "tiny" / "1")
    file = store / "tiny" / "1" / "manifest.json"
    content = json.loads(file.read_text())
    content["variants"] = [variant for variant in content["variants"] if not variant["data_dependent"]]
    for variant in content["variants"]:
        variant["accuracy"]["date"] = "2026-01-02"
    file.write_text(json.dumps(content))  # so that none is exported again: those take long
    counted: list[int] = []
    measure = accuracy.measure

    def counting(*arguments: Any, **settings: Any) -> Any:
        counted.append(1)
        return measure(*arguments, **settings)

    monkeypatch.setattr(measured_rows, "measure", counting)
    plan = ["--published", str(store / "tiny" / "1"), "--name", "tiny", "--store", str(store), "--rates", "8,16"]
    assert dtem("export", [*plan, "--n-images", "300"]) == 0
    before, after = (
        {row.key: row for row in read_evaluation(store / "tiny" / version / "evaluation.json").rows} for version in "12"
    )
    assert len(counted) == 2  # r = 16 of two policies
    assert after["dtem-r8"] == before["dtem-r8"]
    variants = json.loads((store / "tiny" / "2" / "manifest.json").read_text())["variants"]
    dates = {(variant["policy"], variant["r"]): variant["accuracy"]["date"] for variant in variants}
    assert dates["dtem", 8] == dates["tome", 8] == "2026-01-02" < dates["tome", 16]
    assert after["dtem-r8"].scores.tolist() == before["dtem-r8"].scores.tolist()
    assert "tome-r16" not in before


def test_adaptive_variants_state_the_gmacs_of_images(published: Path, manifest: dict[str, Any]) -> None:
    scenes = torch.stack([torch.from_numpy(draw("test", index).image) for index in range(300)])
    for policy in ("atm", "adaptive-dtem"):
        (variant,) = [v for v in manifest["variants"] if v["id"] == f"{policy}-float32-onnx"]
        with torch.no_grad():
            _, tokens, gmacs = frozen_adaptive(policy)(scenes)
        # Where graph and eager round a score to different sides of the threshold, an image keeps one token more.
        assert variant["gmacs"] == pytest.approx(float(gmacs.mean()), rel=1e-4)
        spread = [variant["gmacs_spread"][name] for name in ("p5", "p95")]
        assert spread == pytest.approx(np.percentile(gmacs.numpy(), [5, 95]).tolist(), rel=5e-3)
        assert variant["tokens"] == tokens.double().mean(0).round().int().tolist()
        assert sum(variant["schedule"]) == 197 - variant["tokens"][-1]
        assert (variant["r"], variant["data_dependent"], variant["calibration"]) == (None, True, f"{policy}.json")
        assert variant["promise"].startswith("Batch-invariant")
        assert load_calibration(published / f"{policy}.json").policy == policy


@pytest.mark.usefixtures("quick_format")
def test_precisions_of_a_variant_do_not_collide(tmp_path: Path) -> None:
    embedding_file = ["--embedding", str(tmp_path / "own.safetensors")]
    adaptive = ["--calibrations", str(tmp_path / "atm.json"), "--rates", "0,8"]
    plan = [*command(tmp_path), *embedding_file, *adaptive, "--precisions", "float32,int8"]
    assert dtem("export", plan) == 0
    folder = tmp_path / "store" / "tiny" / "1"
    keys = ["none-r0", "tome-r8", "dtem-r8", "atm"]
    assert {file.name for file in folder.glob("*.onnx")} == {
        f"{key}{suffix}.onnx" for key in keys for suffix in ("", "-int8")
    }
    variants = Manifest.model_validate_json((folder / "manifest.json").read_bytes()).variants
    assert {(v.precision, v.id) for v in variants if v.policy == "dtem" and v.r == 8} == {
        ("float32", "dtem-r8-float32-onnx"),
        ("int8", "dtem-r8-int8-onnx"),
    }
    assert len({v.id for v in variants}) == len(variants) == 12
    golden = np.load(folder / "golden.npz")
    for key in (*keys, "tome-r0", "dtem-r0"):
        difference = golden[f"logits/{key}-int8"] - golden[f"logits/{key}"]
        np.testing.assert_allclose(difference, 0.05, atol=1e-5)
    rows = {row.key: row for row in read_evaluation(folder / "evaluation.json").rows}
    assert [rows[key].series for key in ("tome-r8", "tome-r8-int8")] == ["tome", "tome int8"]
    assert {key.removesuffix("-int8") for key in rows if key.endswith("-int8")} == {
        key for key in rows if not key.endswith("-int8")
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("atm.json,atm.json", "calibrations of atm, atm: expected one of each policy"),
        ("adaptive-dtem.json", "needs the embedding"),
    ],
)
def test_calibrations_that_do_not_fit_are_refused(
    tmp_path: Path, files: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = command(tmp_path)
    names = ",".join(str(tmp_path / name) for name in files.split(","))
    assert dtem("export", [*plan, "--calibrations", names]) == 2
    assert message in capsys.readouterr().err


def test_export_resumed_with_another_plan_leaves_no_file_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [*command(tmp_path), "--formats", "torchscript"]  # the quicker ones to make
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_manifest", interrupt)
        assert dtem("export", [*plan, "--rates", "8", "--embedding", str(tmp_path / "own.safetensors")]) == 130
    (work,) = (tmp_path / "store" / "tiny").iterdir()
    assert [path.name for path in work.iterdir()] == ["measurements.json"], "dropped before the manifest was valid"
    (work / "dtem-r8.pt").touch()  # as a killed export leaves
    assert dtem("export", [*plan, "--rates", "4", "--default-r", "4"]) == 0
    folder = tmp_path / "store" / "tiny" / "1"
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if name.endswith((".pt", ".onnx"))} == {"tome-r4.pt"}
    assert "embedding.safetensors" not in names
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == names - {"manifest.json"}
    assert not [name for name in load_file(folder / "weights.safetensors") if "embedding" in name]


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quick_format")
def test_export_outside_a_git_checkout_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_commit(tmp_path) is None
    monkeypatch.setattr(written, "git_commit", lambda: git_commit(tmp_path))
    assert dtem("export", [*command(tmp_path), "--rates", "0,4,12", "--formats", "onnx"]) == 0
    manifest = Manifest.model_validate_json((tmp_path / "store/tiny/1/manifest.json").read_bytes())
    assert manifest.git_commit is None
    assert manifest.exporter is not None
    assert manifest.exporter.startswith("dtem-serve ")
    assert manifest.default.r == 4, "the rate above 0 nearest to 8; of two, the lower"


def test_manifest_names_the_least_onnxruntime(manifest: dict[str, Any], published: Path) -> None:
    """ONNX Runtime 1.17 refuses this IR version, and 1.18 reads it."""
    assert manifest["min_onnxruntime"] == "1.18"
    assert {onnx.load(file, load_external_data=False).ir_version for file in published.glob("*.onnx")} == {10}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--name", "Pets"], "name 'Pets': expected lower-case letters"),
        (["--name", "../pets"], "name '../pets': expected"),
        (["--name", "p" * 101], "at most 100 characters"),
        (["--version", "v1"], "version 'v1': expected a whole number"),
        (["--version", "0"], "version '0': expected a whole number"),
        (["--rates", "0,4,12", "--default-r", "8"], "default_r 8: expected one of the rates [0, 4, 12]"),
        (["--tolerance", "0"], "parity_tolerance 0.0: expected a number above 0"),
        (["--store", "pyproject.toml"], "pyproject.toml is not a folder"),
        (["--store", "/proc/1"], "cannot be written to"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = command(tmp_path)
    monkeypatch.setattr(training, "import_module", interrupt)
    assert dtem("export", [*plan, *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list((tmp_path / "store").iterdir())


def test_plan_is_checked_without_pytorch() -> None:
    code = "import sys, training.export.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = command(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert dtem("export", plan) == 2
    assert "0.0 GB free" in capsys.readouterr().err
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--default-r", "4"], "default_r 4"),
        (["--default-policy", "dtem"], "default_policy dtem: expected one of none, tome"),
        (["--default-policy", "none", "--default-r", "8"], "default_r 8: expected one of [0], the rates of the"),
        (["--rates", "8,8"], "expected distinct rates"),
        (["--formats", "onnx,tensorrt"], "format tensorrt with precision float32: expected one of onnx float32"),
        (["--precisions", "int4"], "format onnx with precision int4"),
        (["--rates", "8,150"], "cannot remove r=150"),
        (["--architecture", "swin_tiny_patch4_window7_224", "--arguments", "{}"], "window"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtem("export", [*command(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err
