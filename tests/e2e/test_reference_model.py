"""The reference model: a server process, the example images, every rate."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.store import newest_version
from tests.integration.server import ROOT
from training.data.preprocessing import read_pixels
from training.data.sources import REFERENCE_INPUT, DigitScenes, pixel_batches
from training.evaluate.accuracy import measure
from training.evaluate.comparison import compare
from training.evaluate.paired import count_pairs
from training.evaluate.results import read_evaluation
from training.export.onnx_format import OnnxClassifier
from training.models.classifier import frozen_classifier
from training.models.embedding import load_embedding
from training.models.macs import matching_macs, vit_macs
from training.models.vit import MetricChoice, load_vit

FOLDER = newest_version("reference")
RATES = list(range(0, 17, 2))
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".jpg", ".png"))


def fixed(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the variants with a rate; test_adaptive.py covers the adaptive ones."""
    return [variant for variant in manifest["variants"] if not variant["data_dependent"]]


def classify(client: httpx.Client, image: Path, query: str) -> dict[str, Any]:
    response = client.post(f"/classify?{query}", content=image.read_bytes())
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def digit(image: Path) -> str:
    return image.stem.rsplit("-", 1)[1]


def test_examples_have_both_formats() -> None:
    assert len(EXAMPLES) == 12
    assert {path.suffix for path in EXAMPLES} == {".jpg", ".png"}


@pytest.mark.parametrize("r", [0, 8, 16])
def test_most_examples_are_classified_correctly_at_every_rate(client: httpx.Client, r: int) -> None:
    # The first dozen of the test split: at an accuracy of 89 %, fewer than 8 correct have a probability of 1 in 200.
    found = [classify(client, image, f"r={r}")["predictions"][0]["label"] for image in EXAMPLES]
    assert sum(label == digit(image) for label, image in zip(found, EXAMPLES, strict=True)) >= 8


def test_curl_command_of_the_readme_returns_the_digit(client: httpx.Client) -> None:
    for r in (0, 8, 16):
        answer = classify(client, EXAMPLES[0], f"r={r}")
        assert answer["predictions"][0]["label"] == digit(EXAMPLES[0])
        assert answer["r"] == r
    port = client.base_url.port
    command = ["curl", "-sS", "--data-binary", f"@{EXAMPLES[0]}", f"http://127.0.0.1:{port}/classify?r=16"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["predictions"][0]["label"] == digit(EXAMPLES[0])


def test_response_describes_the_variant_and_its_cost(client: httpx.Client, manifest: dict[str, Any]) -> None:
    for variant in fixed(manifest):
        answer = classify(client, EXAMPLES[1], f"r={variant['r']}&policy={variant['policy']}")
        assert (answer["policy"], answer["r"]) == (variant["policy"], variant["r"])
        assert answer["gmacs"] == variant["gmacs"]
        assert answer["accuracy"]["top1"] == variant["accuracy"]["top1"]
        assert answer["tokens"] == variant["tokens"]


def test_unexported_rate_is_refused_with_those_accepted(client: httpx.Client) -> None:
    response = client.post("/classify?r=3", content=EXAMPLES[0].read_bytes())
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["accepted"] == RATES


def test_service_matches_eager_pytorch(client: httpx.Client, manifest: dict[str, Any]) -> None:
    architecture = manifest["architecture"]
    weights = FOLDER / "weights.safetensors"
    vit = load_vit(architecture["timm_name"], weights=weights, **architecture["timm_arguments"])
    merging: list[tuple[str, int, MetricChoice]] = [("none", 0, "keys"), ("tome", 16, "keys")]
    if "embedding" in manifest:
        merging.append(("dtem", 16, load_embedding(FOLDER / manifest["embedding"]["file"])))
    for policy, r, metric in merging:
        classifier = frozen_classifier(vit, REFERENCE_INPUT, r, metric=metric)
        for image in EXAMPLES[:4]:
            pixels = torch.from_numpy(read_pixels(image, REFERENCE_INPUT))[None]
            with torch.no_grad():
                expected = classifier(pixels).softmax(1)[0]
            for prediction in classify(client, image, f"policy={policy}&r={r}&top_k=10")["predictions"]:
                assert prediction["probability"] == pytest.approx(float(expected[prediction["index"]]), abs=1e-3)


def test_published_gmacs_and_tokens_match_the_formula(manifest: dict[str, Any]) -> None:
    architecture = manifest["architecture"]
    vit = load_vit(architecture["timm_name"], **architecture["timm_arguments"])
    for variant in fixed(manifest):
        dim = manifest["embedding"]["dim"] if variant["policy"] == "dtem" else None
        formula = vit_macs(vit, variant["schedule"]) + matching_macs(vit, variant["schedule"], embedding_dim=dim)
        assert variant["gmacs"] == pytest.approx(formula / 1e9, rel=1e-12)
    last = {variant["r"]: variant["tokens"][-1] for variant in fixed(manifest)}
    assert (architecture["n_tokens"], last[0], last[8], last[16]) == (197, 197, 101, 11)


def test_every_rate_is_published_with_an_accuracy_on_ten_thousand_images(manifest: dict[str, Any]) -> None:
    merging = {"tome", "dtem"} if "embedding" in manifest else {"tome"}
    assert {v["policy"] for v in fixed(manifest)} == {"none"} | merging
    for policy in merging:
        assert [v["r"] for v in manifest["variants"] if v["policy"] == policy] == RATES
    assert [v["r"] for v in manifest["variants"] if v["policy"] == "none"] == [0]
    assert manifest["default"]["policy"] == ("dtem" if "embedding" in manifest else "tome")
    assert all(v["accuracy"]["n_images"] == 10_000 for v in manifest["variants"])


def test_dtem_beats_tome_from_rate_8_and_by_more_than_a_point_at_16() -> None:
    measured = read_evaluation(FOLDER / "evaluation.json")
    for found in compare(measured, measured, "tome", "dtem"):
        if (found.other.r or 0) >= 8:
            assert found.n_images == 10_000
            assert found.ci95_points[0] > 0
            assert found.gmacs_percent <= 1.5
        if found.other.r == 16:
            assert found.ci95_points[0] > 1


@pytest.mark.slow
def test_dtem_beats_tome_on_unseen_images() -> None:
    """The published graphs on validation images; the published figures are from the test split."""
    images = list(pixel_batches(DigitScenes("validation", 500), 50, 0))
    right = {name: measure(OnnxClassifier(FOLDER / f"{name}-r16.onnx"), images).scores for name in ("tome", "dtem")}
    assert count_pairs(right["tome"], right["dtem"]).interval()[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("r", [0, 16])
def test_published_accuracy_is_reproduced_on_a_sample(manifest: dict[str, Any], r: int) -> None:
    default = manifest["default"]["policy"]
    (variant,) = [v for v in manifest["variants"] if (v["policy"], v["r"]) == (default, r)]
    result = measure(OnnxClassifier(FOLDER / variant["file"]), pixel_batches(DigitScenes("test", 1000), 50, 0))
    published = variant["accuracy"]["top1"]
    four_sigma = 4 * (published * (1 - published) / 1000) ** 0.5
    assert result.value == pytest.approx(published, abs=four_sigma)


def test_store_stays_small_in_git() -> None:
    names = subprocess.run(["git", "ls-files", "model_store"], cwd=ROOT, capture_output=True, check=True, text=True)
    assert sum((ROOT / name).stat().st_size for name in names.stdout.split()) < 40_000_000


def test_files_match_the_manifest(manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == entry["sha256"]
