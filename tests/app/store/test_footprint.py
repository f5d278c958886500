from dataclasses import replace
from pathlib import Path

import pytest

from app.backends import open_backend
from app.store.catalogue import Catalogue
from app.store.footprint import BYTES_PER_GRAPH, MemoryRule, estimate_bytes
from app.store.loader import read_manifest
from app.store.start import load_catalogue
from deploy.local.process import ROOT
from tests.app.conftest import ONNX, OPTIONS
from tests.app.tiny_store import N_TOKENS, write_store

# A tiny version has four graphs, and some bytes of weights and tensors.
TINY_BYTES = 4 * BYTES_PER_GRAPH + 1_000_000


def test_estimate_counts_the_weights_once_per_graph_unless_they_are_shared(tmp_path: Path) -> None:
    manifest = read_manifest(write_store(tmp_path))
    files = {variant.file for variant in manifest.variants}
    graphs, weights = sum(manifest.files[name].bytes for name in files), 36
    rule = MemoryRule(8, shares_weights=False, count_free_bytes=lambda: 0)
    work = len(files) * (BYTES_PER_GRAPH + 16 * 4 * 8 * N_TOKENS * 3)
    assert estimate_bytes(manifest, manifest.variants, rule) == graphs + weights * len(files) + work
    assert estimate_bytes(manifest, manifest.variants, replace(rule, shares_weights=True)) == graphs + weights + work


def test_estimate_of_the_reference_model_agrees_with_a_measurement() -> None:
    manifest = read_manifest(ROOT / "model_store/reference/5")
    rule = MemoryRule(8, shares_weights=False, count_free_bytes=lambda: 0)
    assert estimate_bytes(manifest, manifest.variants, rule) == pytest.approx(497e6, rel=0.3)
    assert estimate_bytes(manifest, manifest.variants, replace(rule, shares_weights=True)) == pytest.approx(
        327e6, rel=0.4
    )


class Memory:
    """Memory of which every version that is loaded takes a part."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self.rule = MemoryRule(1, shares_weights=False, count_free_bytes=self._take)

    def _take(self) -> int:
        free = self._n_bytes
        if free >= TINY_BYTES:
            self._n_bytes -= TINY_BYTES
        return free


def start(root: Path, n_bytes: int, default_model: str | None = None) -> Catalogue:
    """Load a store with this much free memory."""
    options = replace(ONNX, memory=Memory(n_bytes).rule, default_model=default_model)
    return load_catalogue(root, open_backend("onnxruntime", OPTIONS), options)


def name_all(catalogue: Catalogue) -> list[str]:
    return [f"{model.manifest.name}/{model.manifest.version}" for model in catalogue.all_models()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, version in (("a", "1"), ("b", "1"), ("b", "2")):
        write_store(tmp_path, name, version)
    return tmp_path


def test_start_gives_memory_to_the_default_model_and_its_highest_version_first(root: Path) -> None:
    catalogue = start(root, 2 * TINY_BYTES, "b")
    assert name_all(catalogue) == ["b/1", "b/2"]
    refusal = catalogue.refused["a", 1]
    assert "needs about 40 MB of memory for 4 graphs, more than is free" in refusal.reason
    assert refusal.retry_at is not None
    assert name_all(start(root, TINY_BYTES, "b")) == ["b/2"]


def test_start_loads_the_default_model_even_without_enough_memory(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = start(root, 0, "b")
    assert (name_all(catalogue), sorted(catalogue.refused)) == (["b/2"], [("a", 1), ("b", 1)])
    assert "loading b version 2 all the same" in caplog.text


def test_want_of_memory_does_not_choose_the_default_model(root: Path) -> None:
    catalogue = start(root, 0)
    assert (catalogue.default_model, name_all(catalogue)) == ("a", ["a/1"])
