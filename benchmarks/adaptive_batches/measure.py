"""Batching rules, with eager PyTorch and with the exported graph."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Ratio, open_session, paired_ratio, time_interleaved
from training.cli.model_options import chosen_model, chosen_source, published_calibrations
from training.cli.options import ModelOptions
from training.data.sources import pixel_batches
from training.merging.adaptive import merge_candidates
from training.merging.matching import Matching
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.calibration import Calibration, adaptive_model
from training.models.classifier import AdaptiveClassifier, adaptive_classifier

SINGLE = "single"


class SharedCount(AdaptiveVisionTransformer):
    """The same number of merges for all images of a batch, from their pairs above the threshold.

    Source: arXiv 2505.15160.
    """

    rule = "min"

    def decide_similar(self, block: int, metric: Tensor, size: Tensor) -> Matching:
        found = self.candidates(block, metric, size)
        best, partner = found.scores.max(dim=-1)
        counts = (best > self._per_block[block]).sum(dim=1)
        r = int(counts.min()) if self.rule == "min" else round(float(counts.float().mean()))
        merges = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
        return merge_candidates(found, merges, partner, self.n_protected)


@dataclass(frozen=True)
class RuleResult:
    """One rule at one batch size.

    Units: images/s and ratio to one image per batch, medians over rounds; GMACs, mean over images.
    same_tokens, same_predictions: shares of images that agree with one image per batch.
    logit_difference: largest absolute difference from one image per batch.
    """

    rule: str
    engine: str
    batch: int
    images_per_second: float
    ratio: Ratio
    gmacs: float
    same_tokens: float
    same_predictions: float
    logit_difference: float


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: ValueError if the options name no published version, or it lacks the policy."""
    if options.published is None:
        raise ValueError("--published is missing: expected a version in the store, e.g. model_store/reference/5")
    torch.set_num_threads(1)
    model = ModelOptions(published=options.published, data=options.data, n_images=options.n_images)
    chosen = chosen_model(model)
    calibrations = {one.policy: one for one in published_calibrations(options.published)}
    if options.policy not in calibrations:
        raise ValueError(f"--policy {options.policy}: expected one of {', '.join(calibrations) or 'none'}")
    calibration = calibrations[options.policy]
    classifier = adaptive_classifier(chosen.vit, chosen.rule, calibration, chosen.embedding)
    session = open_session(options.published / f"{options.policy}.onnx", 1)
    pixels = torch.cat([part for part, _ in pixel_batches(chosen_source(model, chosen), 32, 0)])

    def graph(batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {"pixels": batch.numpy()})]

    shared = [_shared(calibration, chosen, rule) for rule in ("min", "mean")]
    found = measure_rules(classifier, shared, graph, pixels, options.batches, options.rounds)
    about = {
        "model": str(options.published),
        "policy": options.policy,
        "n_images": len(pixels),
        "rounds": options.rounds,
    }
    return {"about": about, "rows": [asdict(one) for one in found]}


def measure_rules(
    classifier: AdaptiveClassifier,
    shared: Sequence[AdaptiveClassifier],
    graph: Callable[[Tensor], Any],
    pixels: Tensor,
    sizes: Sequence[int],
    n_rounds: int,
) -> list[RuleResult]:
    """Measure every rule with eager PyTorch, and the exported ones with the graph. Shapes: uint8 (n, H, W, 3)"""
    eager = torch.inference_mode()(classifier.forward)
    single = _outputs(eager, list(pixels.split(1)))  # type: ignore[no-untyped-call]
    by_gmacs, by_roughness = single[2].argsort(), _roughness(pixels).argsort()
    found = []
    for size in sizes:
        in_order = torch.arange(len(pixels))
        ways: dict[tuple[str, str], tuple[Any, Tensor, int]] = {}
        for engine, run in (("eager", eager), ("onnx", graph)):
            ways[engine, SINGLE] = (run, in_order, 1)
            for rule, order in (("padded", in_order), ("sorted", by_roughness), ("oracle", by_gmacs)):
                ways[engine, rule] = (run, order, size)
        for other in shared:
            rule = str(other.model.rule)
            ways["eager", rule] = (torch.inference_mode()(other.forward), in_order, size)
        batches = {way: list(pixels[order].split(n)) for way, (_, order, n) in ways.items()}  # type: ignore[no-untyped-call]
        runs = {way: functools.partial(_outputs, ways[way][0], batches[way]) for way in ways}
        seconds = time_interleaved(runs, n_rounds, title=f"batch {size}")
        for (engine, rule), measured in seconds.items():
            logits, tokens, gmacs = (part[ways[engine, rule][1].argsort()] for part in runs[engine, rule]())
            found.append(
                RuleResult(
                    rule,
                    engine,
                    size,
                    len(pixels) / statistics.median(measured),
                    paired_ratio(seconds[engine, SINGLE], measured),
                    float(gmacs.mean()),
                    float((tokens == single[1]).all(1).double().mean()),
                    float((logits.argmax(1) == single[0].argmax(1)).double().mean()),
                    float((logits - single[0]).abs().max()),
                )
            )
    return found


def _outputs(run: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> list[Tensor]:
    """Return logits, tokens and GMACs of all batches."""
    return [torch.cat(parts) for parts in zip(*(run(batch) for batch in batches), strict=True)]


def _roughness(pixels: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels. Shapes: (n, H, W, 3) -> (n,)"""
    grey = pixels.float().mean(-1)
    return grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))


def _shared(calibration: Calibration, chosen: Any, rule: str) -> AdaptiveClassifier:
    plain = adaptive_model(chosen.vit, calibration.thresholds, calibration.metric, chosen.embedding)
    model = SharedCount(chosen.vit, calibration.thresholds, metric=plain.metric, join=True).eval()
    model.rule = rule
    return AdaptiveClassifier(model, chosen.rule).eval()
