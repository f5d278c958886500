from dataclasses import asdict

import pytest
import torch

from benchmarks.adaptive_batches.measure import SharedCount, measure_rules
from benchmarks.adaptive_batches.report import tables
from tests.training.tiny_vit import tiny_vit
from training.data.digits import draw
from training.data.sources import REFERENCE_INPUT
from training.merging.adaptive import Thresholds
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.classifier import AdaptiveClassifier


def classifier(rule: str | None) -> AdaptiveClassifier:
    limits = Thresholds(0.9, 0.05, 0.5, 2)
    if rule is None:
        return AdaptiveClassifier(AdaptiveVisionTransformer(tiny_vit(), limits), REFERENCE_INPUT).eval()
    model = SharedCount(tiny_vit(), limits)
    model.rule = rule
    return AdaptiveClassifier(model, REFERENCE_INPUT).eval()


def test_rules_are_measured_against_single_images() -> None:
    pixels = torch.stack([torch.from_numpy(draw("validation", index).image) for index in range(12)])
    own = classifier(None)
    shared = [classifier(rule) for rule in ("min", "mean")]
    found = measure_rules(own, shared, torch.inference_mode()(own.forward), pixels, [4], 6)
    rows = {(one.engine, one.rule): one for one in found}
    assert len(rows) == 4 + 4 + 2
    single = rows["eager", "single"]
    assert single.ratio.median == 1.0
    assert single.logit_difference == pytest.approx(0, abs=1e-5)
    for engine in ("eager", "onnx"):
        for rule in ("padded", "sorted", "oracle"):
            one = rows[engine, rule]
            assert (one.same_tokens, one.same_predictions) == (1.0, 1.0)
            assert one.logit_difference < 1e-4
            assert abs(one.gmacs - single.gmacs) < 1e-6
    # Rule min merges only pairs above the threshold, and fewer of them.
    assert rows["eager", "min"].gmacs > single.gmacs
    assert rows["eager", "min"].same_tokens < 1
    about = {"model": "m", "policy": "atm", "n_images": 12, "rounds": 6}
    assert "| 4 | eager | min |" in tables({"about": about, "rows": [asdict(one) for one in found]})
