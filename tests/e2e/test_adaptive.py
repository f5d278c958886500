"""Adaptive policies of the reference model: a server process, plain and cluttered images."""

import io
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.store import newest_version
from tests.integration.server import ROOT
from training.cli.model_options import published_calibrations, published_rule
from training.data.sources import DigitScenes, pixel_batches
from training.evaluate.accuracy import measure
from training.evaluate.comparison import compare
from training.evaluate.results import read_evaluation
from training.export.onnx_format import OnnxClassifier
from training.models.classifier import AdaptiveClassifier
from training.models.embedding import load_embedding
from training.models.macs import vit_macs
from training.models.vit import load_vit

FOLDER = newest_version("reference")
POLICIES = ["atm", "adaptive-dtem"]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".jpg", ".png"))


@pytest.fixture(scope="module")
def classifiers(manifest: dict[str, Any]) -> dict[str, AdaptiveClassifier]:
    """Return models in eager PyTorch, built from the files of the version."""
    architecture = manifest["architecture"]
    weights, embedding = FOLDER / "weights.safetensors", load_embedding(FOLDER / "embedding.safetensors").eval()
    vit = load_vit(architecture["timm_name"], weights=weights, **architecture["timm_arguments"]).eval()
    rule = published_rule(FOLDER)
    return {
        found.policy: AdaptiveClassifier(found.model(vit, embedding), rule).eval()
        for found in published_calibrations(FOLDER)
    }


def encode_png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def plain() -> bytes:
    return encode_png(np.full((112, 112, 3), (200, 180, 90)))


def cluttered() -> bytes:
    return encode_png(np.random.default_rng(3).integers(0, 256, (112, 112, 3)))


def classify(client: httpx.Client, image: bytes, policy: str) -> dict[str, Any]:
    response = client.post(f"/classify?policy={policy}&top_k=10", content=image)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def probabilities(answer: dict[str, Any]) -> list[float]:
    return [one["probability"] for one in sorted(answer["predictions"], key=lambda one: one["index"])]


@pytest.mark.parametrize("policy", POLICIES)
def test_plain_image_costs_less_than_a_cluttered_one_and_results_are_batch_invariant(
    client: httpx.Client, policy: str
) -> None:
    images = {
        "plain.png": plain(),
        "cluttered.png": cluttered(),
        **{path.name: path.read_bytes() for path in EXAMPLES[:6]},
    }
    alone = {name: classify(client, data, policy) for name, data in images.items()}
    assert alone["plain.png"]["gmacs"] < 0.7 * alone["cluttered.png"]["gmacs"]
    assert alone["plain.png"]["tokens"][-1] < alone["cluttered.png"]["tokens"][-1]
    form = [("file", (name, data)) for name, data in images.items()]
    together = client.post(f"/classify?policy={policy}&top_k=10", files=form).json()["results"]
    for answer in together:
        expected = alone[answer["filename"]]
        assert answer["batch_size"] == len(images)
        assert answer["tokens"] == expected["tokens"]
        assert answer["gmacs"] == pytest.approx(expected["gmacs"], rel=1e-6)
        assert probabilities(answer) == pytest.approx(probabilities(expected), abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_service_matches_eager_pytorch(
    client: httpx.Client, classifiers: dict[str, AdaptiveClassifier], policy: str
) -> None:
    for image in (plain(), cluttered()):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(image))))[None]
        with torch.no_grad():
            logits, tokens, gmacs = classifiers[policy](pixels)
        answer = classify(client, image, policy)
        assert answer["tokens"] == tokens[0].tolist()
        assert answer["gmacs"] == pytest.approx(float(gmacs), rel=1e-6)
        assert probabilities(answer) == pytest.approx(logits.softmax(1)[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_rate_is_refused_and_models_lists_the_promise(client: httpx.Client, policy: str) -> None:
    problem = client.post(f"/classify?policy={policy}&r=8", content=plain())
    assert (problem.status_code, problem.json()["field"]) == (422, "r")
    (variant,) = [
        variant for variant in client.get("/models/reference").json()["variants"] if variant["policy"] == policy
    ]
    assert variant["data_dependent"]
    assert variant["gmacs_spread"]["p5"] < variant["gmacs"] < variant["gmacs_spread"]["p95"]
    assert variant["promise"].startswith("Batch-invariant: results do not depend on the other images in the batch")


def test_metrics_have_a_histogram_of_kept_tokens(client: httpx.Client) -> None:
    answer = classify(client, cluttered(), "atm")
    lines = client.get("/metrics").text.splitlines()
    series = [line for line in lines if line.startswith("dtem_kept_tokens_") and 'policy="atm"' in line]
    assert any(line.startswith("dtem_kept_tokens_bucket") for line in series)
    (total,) = [float(line.split()[-1]) for line in series if line.startswith("dtem_kept_tokens_sum")]
    assert total >= answer["tokens"][-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_published_gmacs_fall_by_thirty_percent_without_loss_of_accuracy(policy: str) -> None:
    measured = read_evaluation(FOLDER / "evaluation.json")
    (found,) = compare(measured, measured, "none", policy)
    assert found.n_images == 10_000
    assert found.gmacs_percent < -30
    assert found.ci95_points[0] > -0.3
    # No significant loss.
    assert found.ci95_points[1] >= 0


@pytest.mark.parametrize("policy", POLICIES)
def test_published_costs_match_eager_pytorch(
    classifiers: dict[str, AdaptiveClassifier], manifest: dict[str, Any], policy: str
) -> None:
    (variant,) = [variant for variant in manifest["variants"] if variant["policy"] == policy]
    pixels, _ = next(pixel_batches(DigitScenes("test", 64), 64, 0))
    with torch.inference_mode():
        logits, tokens, gmacs = classifiers[policy](pixels)
    exported = OnnxClassifier(FOLDER / variant["file"])(pixels)
    # Rounding decides a few of them.
    assert float((exported[1] == tokens).all(1).double().mean()) > 0.95
    assert float((exported[0].argmax(1) == logits.argmax(1)).double().mean()) > 0.95
    unmerged = vit_macs(classifiers[policy].model.vit, [0] * manifest["architecture"]["depth"]) / 1e9
    assert variant["gmacs"] == pytest.approx(float(gmacs.mean()), abs=5 * float(gmacs.std()) / 8)
    assert variant["gmacs"] < 0.7 * unmerged


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_published_accuracy_and_cost_are_reproduced_on_a_sample(manifest: dict[str, Any], policy: str) -> None:
    (variant,) = [variant for variant in manifest["variants"] if variant["policy"] == policy]
    result = measure(OnnxClassifier(FOLDER / variant["file"]), pixel_batches(DigitScenes("test", 1000), 50, 0))
    assert result.gmacs is not None
    published = variant["accuracy"]["top1"]
    assert result.value == pytest.approx(published, abs=4 * (published * (1 - published) / 1000) ** 0.5)
    assert float(result.gmacs.mean()) == pytest.approx(variant["gmacs"], rel=0.05)
