"""Tasks: the outputs of a task other than classification pass from the runner to the result of an image."""

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from app.backends import Outputs, Pixels, Runner
from app.errors import StoreError
from app.observability.record import ImageResult
from app.serving.engine import Engine
from app.serving.entry import Entry, Outcomes
from app.serving.scheduler import SchedulerLimits
from app.store.catalogue import ServedModel
from app.store.loader import load_version
from app.store.manifest import Manifest
from app.store.outputs import TASKS, GraphOutput, list_outputs
from tests.app.conftest import ONNX
from tests.app.tiny_store import SIDE, digest, read_manifest, write_manifest, write_store

SECONDS = 10
MASK = GraphOutput("mask", "mask", np.float32, (SIDE, SIDE))


def make_masks(pixels: Pixels) -> Outputs:
    return {"mask": pixels.astype(np.float32).mean(axis=3)}


class MaskBackend:
    """Loads any file as a graph that returns one mask per image."""

    def load(self, path: Path, input_name: str, outputs: Mapping[str, str]) -> Runner:
        assert outputs == {"mask": "mask"}
        return self

    def run(self, pixels: Pixels) -> Outputs:
        return make_masks(pixels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version whose task returns a mask, with golden masks."""
    monkeypatch.setitem(TASKS, "segment", lambda manifest: MASK)
    folder = write_store(tmp_path)
    manifest = {**read_manifest(folder), "task": "segment"}
    manifest["variants"] = [variant for variant in manifest["variants"] if variant["policy"] == "tome"]
    with np.load(folder / "golden.npz") as archive:
        pixels = archive["pixels"]
    masks: dict[str, Any] = {
        f"mask/tome-r{variant['r']}": make_masks(pixels)["mask"] for variant in manifest["variants"]
    }
    np.savez(folder / "golden.npz", pixels=pixels, **masks)
    manifest["files"]["golden.npz"] = digest(folder / "golden.npz")
    write_manifest(folder, manifest)
    return folder


def load(folder: Path) -> ServedModel:
    return load_version(folder, MaskBackend(), ONNX, n_threads=1)


def test_output_of_another_task_reaches_the_image_result(folder: Path) -> None:
    outcomes: SimpleQueue[Outcomes] = SimpleQueue()
    engine = Engine(SchedulerLimits(64, 4), outcomes.put)
    engine.start()
    variant, now = load(folder).variant("tome", 8), engine.clock()
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    engine.submit([Entry(image, (variant,), ("tiny", "1", "tome"), now, now + 1) for image in images])
    results = [result for _, result in outcomes.get(timeout=SECONDS)]
    engine.stop(SECONDS)
    for image, result in zip(images, results, strict=True):
        assert isinstance(result, ImageResult)
        assert list(result.outputs) == ["mask"]
        np.testing.assert_allclose(result.outputs["mask"], make_masks(image[None])["mask"][0], rtol=1e-6)
        assert result.tokens == list(variant.spec.tokens)


def test_golden_outputs_of_another_task_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskBackend, "run", lambda self, pixels: {"mask": make_masks(pixels)["mask"] + 1})
    with pytest.raises(StoreError, match="golden mask differ by 1"):
        load(folder)


def test_list_outputs_appends_the_costs_of_adaptive_policies(tmp_path: Path) -> None:
    manifest = Manifest.model_validate_json((write_store(tmp_path) / "manifest.json").read_bytes())
    roles = {spec.key.policy: [output.role for output in list_outputs(manifest, spec)] for spec in manifest.variants}
    assert roles == {"none": ["logits"], "tome": ["logits"], "atm": ["logits", "tokens", "gmacs"]}
