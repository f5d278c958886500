import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from app.backends import ENGINES, open_backend
from app.errors import StoreError
from app.store import loader
from app.store.catalogue import Catalogue
from app.store.files import MAX_MANIFEST_BYTES
from app.store.loader import StoreOptions
from app.store.manifest import Manifest
from app.store.start import load_catalogue
from tests.app.conftest import ONNX, OPTIONS
from tests.app.tiny_store import (
    ATM_BIAS,
    WEIGHTS_FILE,
    bias_of,
    digest,
    expected_logits,
    read_manifest,
    write_golden,
    write_manifest,
    write_store,
)


def load(root: Path, options: StoreOptions = ONNX) -> Catalogue:
    engine = next(name for name, engine in ENGINES.items() if engine.graph_format == options.graph_format)
    return load_catalogue(root, open_backend(engine, OPTIONS), options)


def renew_digests(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"] = {p.name: digest(p) for p in sorted(folder.iterdir()) if p.name != "manifest.json"}
    write_manifest(folder, manifest)


@pytest.mark.parametrize("graph_format", ["onnx", "torchscript"])
def test_load_catalogue_serves_the_configured_format(tmp_path: Path, graph_format: str) -> None:
    write_store(tmp_path, formats=("onnx", "torchscript"))
    model = load(tmp_path, StoreOptions(graph_format, "float32", None)).find(None, None)
    assert {variant.spec.format for variant in model.variants.values()} == {graph_format}
    assert model.rates("tome") == [0, 8, 16]
    pixels = np.full((2, 8, 8, 3), 9, np.uint8)
    for (_, r, _), variant in model.variants.items():
        answer = variant.runner.run(pixels)
        np.testing.assert_allclose(answer["logits"], expected_logits(pixels, ATM_BIAS if r is None else r), atol=1e-5)
        assert ("tokens" in answer) == (r is None)
        assert variant.latency.summary_ms() is not None


def test_load_catalogue_shares_a_graph_file_between_variants(catalogue: Catalogue) -> None:
    model = catalogue.find(None, None)
    assert model.variant("none", 0).runner is model.variant("tome", 0).runner
    assert model.variant("none", 0).latency is not model.variant("tome", 0).latency


def test_load_catalogue_takes_the_highest_version_by_number(tmp_path: Path) -> None:
    for version in ("2", "10", "9"):
        write_store(tmp_path, version=version)
    catalogue = load(tmp_path)
    assert catalogue.find(None, None).manifest.version == "10"
    assert catalogue.find("tiny", "2").manifest.version == "2"


def test_load_catalogue_ignores_unfinished_and_temporary_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(tmp_path)
    (tmp_path / "tiny" / "2").mkdir()
    (tmp_path / "tiny" / ".3.tmp").mkdir()
    write_store(tmp_path, version="5").rename(tmp_path / "tiny" / "5.tmp")
    (tmp_path / "manifest.schema.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert list(load(tmp_path).models["tiny"]) == [1]
    ignored = [record.getMessage() for record in caplog.records if "ignored folder" in record.message]
    assert [message.partition("tiny/")[2] for message in ignored] == [
        "2: not finished: it has no manifest.json",
        "5.tmp: not a version number; accepted: [1-9][0-9]{0,8}",
    ]


def test_load_catalogue_serves_several_models(tmp_path: Path) -> None:
    write_store(tmp_path, name="b")
    write_store(tmp_path, name="a")
    assert load(tmp_path, StoreOptions("onnx", "float32", "a")).default_model == "a"
    assert load(tmp_path).default_model == "b"


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_load_catalogue_refuses_a_store_without_models(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=name):
        load(tmp_path / name)


def change_byte(folder: Path) -> None:
    data = bytearray((folder / "tome-r8.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tome-r8.onnx").write_bytes(data)


def append_byte(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes() + b"!")


def falsify_golden(folder: Path) -> None:
    write_golden(folder, error=0.5)
    renew_digests(folder)


def falsify_golden_with_nan(folder: Path) -> None:
    write_golden(folder, error=float("nan"))
    renew_digests(folder)


def break_golden(folder: Path) -> None:
    (folder / "golden.npz").write_bytes(b"PK not really")
    renew_digests(folder)


def drop_golden_rate(folder: Path) -> None:
    with np.load(folder / "golden.npz") as archive:
        arrays = {key: archive[key] for key in archive if key != "logits/tome-r16"}
    np.savez(folder / "golden.npz", **arrays)
    renew_digests(folder)


def falsify_tokens(folder: Path) -> None:
    change_golden(folder, "tokens/atm", 1)


def falsify_gmacs(folder: Path) -> None:
    change_golden(folder, "gmacs/atm", np.float32(1e-3))


def change_golden(folder: Path, name: str, by: Any) -> None:
    with np.load(folder / "golden.npz") as archive:
        arrays = {key: archive[key] + by if key == name else archive[key] for key in archive}
    np.savez(folder / "golden.npz", **arrays)
    renew_digests(folder)


def drop_tokens(folder: Path) -> None:
    with np.load(folder / "golden.npz") as archive:
        arrays = {key: archive[key] for key in archive if key != "tokens/atm"}
    np.savez(folder / "golden.npz", **arrays)
    renew_digests(folder)


def replace_adaptive_graph(folder: Path) -> None:
    (folder / "atm.onnx").write_bytes((folder / "tome-r8.onnx").read_bytes())
    renew_digests(folder)


def pickle_golden(folder: Path) -> None:
    np.savez(folder / "golden.npz", pixels=np.array([{}], object))
    renew_digests(folder)


def resize_golden(folder: Path) -> None:
    np.savez(folder / "golden.npz", pixels=np.zeros((2, 9, 8, 3), np.uint8), **golden_logits(folder))
    renew_digests(folder)


def empty_golden(folder: Path) -> None:
    np.savez(folder / "golden.npz", pixels=np.zeros((0, 8, 8, 3), np.uint8), **golden_logits(folder))
    renew_digests(folder)


def golden_logits(folder: Path) -> dict[str, Any]:
    with np.load(folder / "golden.npz") as archive:
        return {key: archive[key] for key in archive if key != "pixels"}


def break_graph(folder: Path) -> None:
    (folder / "tome-r16.onnx").write_bytes(b"not a graph")
    renew_digests(folder)


def link_outside(folder: Path) -> None:
    outside = folder.parents[2] / "outside.onnx"
    (folder / "tome-r8.onnx").rename(outside)
    (folder / "tome-r8.onnx").symlink_to(outside)


def replace_file_by_folder(folder: Path) -> None:
    (folder / "tome-r8.onnx").unlink()
    (folder / "tome-r8.onnx").mkdir()


def replace_file_by_fifo(folder: Path) -> None:
    (folder / "tome-r8.onnx").unlink()
    os.mkfifo(folder / "tome-r8.onnx")


def replace_manifest_by_fifo(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def replace_file_by_socket(folder: Path) -> None:
    (folder / "tome-r8.onnx").unlink()
    # A relative path, since that of a socket has at most 107 bytes.
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("tome-r8.onnx")


def link_to(target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "tome-r8.onnx").unlink()
        (folder / "tome-r8.onnx").symlink_to(target)

    return apply


def make_manifest_huge(folder: Path) -> None:
    os.truncate(folder / "manifest.json", MAX_MANIFEST_BYTES + 1)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = read_manifest(folder)
        change(manifest)
        write_manifest(folder, manifest)

    return apply


BREAKAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing file": (lambda folder: (folder / "tome-r8.onnx").unlink(), "tome-r8.onnx", "No such file"),
    "changed byte": (change_byte, "tome-r8.onnx", "SHA-256"),
    "appended byte": (append_byte, WEIGHTS_FILE, "37 bytes, expected 36"),
    "unlisted file": (lambda folder: (folder / "extra.bin").touch(), "extra.bin", "not listed"),
    "not JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json", "JSON"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json", "JSON"),
    "not UTF-8": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json", "JSON"),
    "missing key": (edit(lambda m: m.pop("labels")), "manifest.json", "labels: Field required"),
    "schema version": (edit(lambda m: m.update(schema_version=2)), "manifest.json", "schema_version"),
    "unknown task": (
        edit(lambda m: m.update(task="dream")),
        "manifest.json",
        "'dream' is not served; accepted: classify",
    ),
    "unknown key": (edit(lambda m: m.update(colour="red")), "manifest.json", "colour"),
    "other name": (edit(lambda m: m.update(name="other")), "manifest.json", "declares other/1"),
    "other version": (edit(lambda m: m.update(version="7")), "manifest.json", "declares tiny/7"),
    "fewer labels": (edit(lambda m: m.update(labels=["one", "two"])), "golden.npz", "(4, 2)"),
    "one label": (edit(lambda m: m.update(labels=["one"])), "manifest.json", "expected activation 'sigmoid'"),
    "input name": (edit(lambda m: m["input"].update(name="image")), ".onnx", "no input 'image'"),
    "wrong golden": (falsify_golden, ".onnx", "golden logits differ by 0.5"),
    "golden of NaN": (falsify_golden_with_nan, ".onnx", "golden logits differ by nan"),
    "broken golden": (break_golden, "golden.npz", "cannot be read"),
    "golden without a rate": (drop_golden_rate, "golden.npz", "missing array: logits/tome-r16"),
    "other tokens than golden": (falsify_tokens, "atm.onnx", "golden token counts differ from the export"),
    "other GMACs than golden": (falsify_gmacs, "atm.onnx", "golden GMACs differ from the export"),
    "golden without tokens": (drop_tokens, "golden.npz", "missing array: tokens/atm"),
    "graph without token counts": (replace_adaptive_graph, "atm.onnx", "no output 'tokens'"),
    "pickled golden": (pickle_golden, "golden.npz", "cannot be read"),
    "golden of other size": (resize_golden, "golden.npz", "pixels is uint8 (2, 9, 8, 3), expected uint8 (2, 8, 8, 3)"),
    "golden without images": (empty_golden, "golden.npz", "pixels is"),
    "broken graph": (break_graph, "tome-r16.onnx", "ONNX Runtime cannot load the graph"),
    "link outside": (link_outside, "tome-r8.onnx", "outside the model store"),
    "link to nothing": (link_to("nothing"), "tome-r8.onnx", "No such file"),
    "link to itself": (link_to("tome-r8.onnx"), "tome-r8.onnx", "Too many levels of symbolic links"),
    "link to a device": (link_to("/dev/zero"), "tome-r8.onnx", "is a device, expected a regular file"),
    "FIFO": (replace_file_by_fifo, "tome-r8.onnx", "is a FIFO, expected a regular file"),
    "FIFO for a manifest": (replace_manifest_by_fifo, "manifest.json", "is a FIFO, expected a regular file"),
    "unlisted FIFO": (lambda folder: os.mkfifo(folder / "pipe"), "pipe", "not listed"),
    "socket": (replace_file_by_socket, "tome-r8.onnx", "is a socket, expected a regular file"),
    "hidden file": (lambda folder: (folder / ".weights").touch(), ".weights", "not listed"),
    "hidden folder": (lambda folder: (folder / ".git").mkdir(), ".git", "not listed"),
    "huge manifest": (make_manifest_huge, "manifest.json", "has more than 32000000 bytes"),
    "folder for a file": (replace_file_by_folder, "tome-r8.onnx", "is a folder, expected a regular file"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_load_catalogue_refuses_a_broken_store_naming_file_and_reason(tmp_path: Path, name: str) -> None:
    breakage, file, reason = BREAKAGES[name]
    store = tmp_path / "store"
    breakage(write_store(store))
    with pytest.raises(StoreError) as caught:
        load(store)
    assert file in caught.value.file
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_load_catalogue_serves_the_good_version_beside_bad_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(tmp_path)
    for number, (breakage, _, _) in enumerate(BREAKAGES.values(), 2):
        breakage(write_store(tmp_path, version=str(number)))
    results: list[str] = []
    catalogue = load_catalogue(tmp_path, open_backend("onnxruntime", OPTIONS), ONNX, results.append)
    assert (list(catalogue.models["tiny"]), results) == ([1], ["refused"] * len(BREAKAGES))
    for number, (_, file, reason) in enumerate(BREAKAGES.values(), 2):
        refusal = catalogue.refused["tiny", number]
        assert file in refusal.file
        assert reason.replace("tiny/1", f"tiny/{number}") in refusal.reason
        (line,) = [line for line in caplog.text.splitlines() if f"refused tiny version {number} " in line]
        assert line.endswith(f": {refusal.file}: {refusal.reason}")


def test_load_catalogue_accepts_leftovers_and_links_within_the_store(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    for leftover in (".nfs0000000001a2", ".DS_Store", "._tome-r8.onnx", ".manifest.json.swp"):
        (folder / leftover).write_bytes(b"not listed")
    (tmp_path / "blobs").mkdir()
    # As in the cache of Hugging Face's hub.
    for path in (path for path in folder.iterdir() if not path.name.startswith(".")):
        blob = path.rename(tmp_path / "blobs" / digest(path)["sha256"])
        path.symlink_to(os.path.relpath(blob, folder))
    assert load(tmp_path).find(None, None).rates("tome") == [0, 8, 16]


def test_load_catalogue_refuses_golden_outputs_that_unpack_to_a_large_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_store(tmp_path)
    monkeypatch.setattr(loader, "MAX_GOLDEN_BYTES", 100_000)
    with np.load(folder / "golden.npz") as archive:
        arrays = {key: archive[key] for key in archive}
    np.savez_compressed(folder / "golden.npz", **arrays, zeros=np.zeros(100_000, np.uint8))
    renew_digests(folder)
    assert (folder / "golden.npz").stat().st_size < 10_000
    with pytest.raises(StoreError, match=r"golden\.npz: unpacks to 1\d{5} bytes; accepted: at most 100000"):
        load(tmp_path)


def test_load_catalogue_refuses_a_graph_that_loops_for_ever(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    graph = onnx.load_model(folder / "tome-r8.onnx", load_external_data=False)
    helper = onnx.helper
    same = [helper.make_node("Identity", [f"{name}_in"], [f"{name}_out"]) for name in ("go", "value")]
    body = helper.make_graph(
        same,
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_in", onnx.TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", onnx.TensorProto.FLOAT, None),
        ],
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "go"))
    graph.graph.node[-1].output[0] = "first"
    graph.graph.node.append(helper.make_node("Loop", ["", "go", "first"], ["logits"], body=body))
    (folder / "tome-r8.onnx").write_bytes(graph.SerializeToString())
    renew_digests(folder)
    with pytest.raises(StoreError, match=r"tome-r8\.onnx: ONNX Runtime did not finish a run within 0\.5 s"):
        load(tmp_path, replace(ONNX, max_run_seconds=0.5))


def test_load_catalogue_needs_a_good_version_of_the_default_model(tmp_path: Path) -> None:
    write_store(tmp_path, name="a")
    change_byte(write_store(tmp_path, name="b"))
    assert load(tmp_path).default_model == "a"
    with pytest.raises(StoreError, match=r"b/1/tome-r8\.onnx: SHA-256"):
        load(tmp_path, StoreOptions("onnx", "float32", "b"))


def test_load_catalogue_refuses_a_default_missing_in_the_format(tmp_path: Path) -> None:
    write_store(tmp_path)
    with pytest.raises(
        StoreError,
        match=r"manifest\.json: the default variant \(policy tome, r 8\) is not exported as float32 torchscript; "
        r"available: float32 onnx$",
    ):
        load(tmp_path, StoreOptions("torchscript", "float32", None))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_load_catalogue_refuses_an_unreadable_file(tmp_path: Path) -> None:
    (write_store(tmp_path) / "tome-r8.onnx").chmod(0)
    with pytest.raises(StoreError, match="Permission denied"):
        load(tmp_path)


INT8_ERROR = np.float32(0.25)


@pytest.fixture
def mixed_store(tmp_path: Path) -> Path:
    """A store whose version has every fixed variant in float32 and, with other graphs and golden logits, in int8."""
    folder = write_store(tmp_path)
    manifest = read_manifest(folder)
    with np.load(folder / "golden.npz") as archive:
        arrays = {key: archive[key] for key in archive}
    for spec in [spec for spec in manifest["variants"] if spec["r"] is not None]:
        key, file = f"{spec['policy']}-r{spec['r']}", f"int8-r{spec['r']}.onnx"
        graph = onnx.load_model(folder / spec["file"], load_external_data=False)
        (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "bias"]
        bias.CopyFrom(onnx.numpy_helper.from_array(bias_of(spec["r"]) + INT8_ERROR, "bias"))
        (folder / file).write_bytes(graph.SerializeToString())
        arrays[f"logits/{key}-int8"] = arrays[f"logits/{key}"] + INT8_ERROR
        manifest["variants"].append({**spec, "id": f"{key}-int8-onnx", "precision": "int8", "file": file})
    np.savez(folder / "golden.npz", **arrays)
    write_manifest(folder, manifest)
    renew_digests(folder)
    return tmp_path


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("int8", INT8_ERROR)])
def test_load_catalogue_serves_the_configured_precision(mixed_store: Path, precision: str, error: float) -> None:
    model = load(mixed_store, StoreOptions("onnx", precision, None)).find(None, None)
    assert {key.precision for key in model.variants} == {precision}
    assert model.rates("tome") == [0, 8, 16]
    variant = model.variant("tome", 8)
    assert variant.spec.precision == precision
    pixels = np.full((2, 8, 8, 3), 9, np.uint8)
    np.testing.assert_allclose(variant.runner.run(pixels)["logits"], expected_logits(pixels, 8) + error, atol=1e-5)


def test_precisions_of_one_rate_have_different_golden_keys(mixed_store: Path) -> None:
    specs = Manifest.model_validate_json((mixed_store / "tiny" / "1" / "manifest.json").read_bytes()).variants
    keys = {str(spec.key): spec.precision for spec in specs if (spec.policy, spec.r) == ("tome", 8)}
    assert keys == {"tome-r8": "float32", "tome-r8-int8": "int8"}
