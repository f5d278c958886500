"""What becomes of images that keep different numbers of tokens when they share a batch: throughput, and agreement.

`python -m benchmarks.adaptive_batches --published model_store/reference/4 --policy atm --out docs/results/adaptive-batches`
Rules, each against every image alone, on the same images, in turns within one process:
- padded: each image keeps its own tokens; rows past an image's own are masked. What is exported and served.
- sorted: the same, batches made of images that a cheap look takes to be alike (how much neighbouring pixels differ).
- oracle: the same, sorted by the GMACs that they really take: the best that sorting could do.
- min: one count for the batch in each block, that of the image with the fewest pairs above the threshold; each image
  merges its best so many. mean: the rounded mean of the counts, which merges below the threshold too.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Ratio, open_session, paired_ratio, time_in_turns
from training.cli.model_options import add_model_options, chosen_model, chosen_source, published_calibrations
from training.data.sources import pixel_batches
from training.merging.adaptive import merge_candidates
from training.merging.matching import Matching
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.calibration import Calibration, adaptive_model
from training.models.classifier import AdaptiveClassifier


class SharedCount(AdaptiveVisionTransformer):
    """One number of merges for the whole batch, by the counts of pairs above the threshold (arXiv 2505.15160)."""

    rule = "min"

    def decide_similar(self, block: int, metric: Tensor, size: Tensor) -> Matching:
        found = self.candidates(block, metric, size)
        best, partner = found.scores.max(dim=-1)
        counts = (best > self._per_block[block]).sum(dim=1)
        r = int(counts.min()) if self.rule == "min" else round(float(counts.float().mean()))
        merges = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
        return merge_candidates(found, merges, partner, self.n_protected)


@dataclass(frozen=True)
class Figures:
    """One rule at one batch size. Units: images/s and its ratio to the images alone, medians over rounds; GMACs that an
    image's own tokens take, mean; agreement with the answers alone: of predictions, a share, and of logits, the largest
    difference.
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


def measure_rules(
    classifier: AdaptiveClassifier,
    shared: Sequence[AdaptiveClassifier],
    graph: Callable[[Tensor], Any],
    pixels: Tensor,
    sizes: Sequence[int],
    n_rounds: int,
) -> list[Figures]:
    """Measure every rule with eager PyTorch, and those that are exported with the graph. Shapes: uint8 (n, H, W, 3)"""
    eager = torch.inference_mode()(classifier.forward)
    alone = _answers(eager, list(pixels.split(1)))  # type: ignore[no-untyped-call]
    oracle, sight = alone[2].argsort(), _roughness(pixels).argsort()
    found = []
    for size in sizes:
        in_order = torch.arange(len(pixels))
        ways: dict[tuple[str, str], tuple[Any, Tensor, int]] = {}
        for engine, run in (("eager", eager), ("onnx", graph)):
            ways[engine, "alone"] = (run, in_order, 1)
            for rule, order in (("padded", in_order), ("sorted", sight), ("oracle", oracle)):
                ways[engine, rule] = (run, order, size)
        for other in shared:
            rule = str(other.model.rule)
            ways["eager", rule] = (torch.inference_mode()(other.forward), in_order, size)
        batches = {way: list(pixels[order].split(n)) for way, (_, order, n) in ways.items()}  # type: ignore[no-untyped-call]
        runs = {way: functools.partial(_answers, ways[way][0], batches[way]) for way in ways}
        seconds = time_in_turns(runs, n_rounds, title=f"batch {size}")
        for (engine, rule), measured in seconds.items():
            logits, tokens, gmacs = (part[ways[engine, rule][1].argsort()] for part in runs[engine, rule]())
            found.append(
                Figures(
                    rule,
                    engine,
                    size,
                    len(pixels) / statistics.median(measured),
                    paired_ratio(seconds[engine, "alone"], measured),
                    float(gmacs.mean()),
                    float((tokens == alone[1]).all(1).double().mean()),
                    float((logits.argmax(1) == alone[0].argmax(1)).double().mean()),
                    float((logits - alone[0]).abs().max()),
                )
            )
    return found


def _answers(run: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> list[Tensor]:
    """Return logits, tokens and GMACs of all batches."""
    return [torch.cat(parts) for parts in zip(*(run(batch) for batch in batches), strict=True)]


def _roughness(pixels: Tensor) -> Tensor:
    """Return how much neighbouring pixels differ, a look that costs next to nothing. Shapes: (n, H, W, 3) -> (n,)"""
    grey = pixels.float().mean(-1)
    return grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))


def markdown(found: Sequence[Figures], about: dict[str, Any]) -> str:
    lines = [
        "| batch | engine | rule | images/s | against alone (95 %) | GMACs | same tokens % | same answers % "
        "| largest difference of a logit |",
        "|---:|---|---|" + "---:|" * 6,
    ]
    for one in found:
        low, high = one.ratio.ci95
        lines.append(
            f"| {one.batch} | {one.engine} | {one.rule} | {one.images_per_second:.0f} | {one.ratio.median:.2f}× "
            f"({low:.2f} … {high:.2f}) | {one.gmacs:.3f} | {100 * one.same_tokens:.1f} "
            f"| {100 * one.same_predictions:.1f} | {one.logit_difference:.1e} |"
        )
    lines += [
        "",
        f"{about['model']}, policy {about['policy']}, {about['n_images']} test images, one thread, FP32, median of "
        f"{about['rounds']} rounds in turns. Same tokens, same answers: as the image alone, in every block.",
    ]
    return "\n".join(lines) + "\n"


def _shared(calibration: Calibration, chosen: Any, rule: str) -> AdaptiveClassifier:
    plain = adaptive_model(chosen.vit, calibration.thresholds, calibration.metric, chosen.embedding)
    model = SharedCount(chosen.vit, calibration.thresholds, metric=plain.metric, join=True).eval()
    model.rule = rule
    return AdaptiveClassifier(model, chosen.rule).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(n_images=192)
    parser.add_argument("--policy", default="atm")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="files <out>.md and <out>.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = chosen_model(options)
    calibration = next(one for one in published_calibrations(options.published) if one.policy == options.policy)
    classifier = AdaptiveClassifier(calibration.model(chosen.vit, chosen.embedding), chosen.rule).eval()
    session = open_session(options.published / f"{options.policy}.onnx", 1)
    pixels = torch.cat([part for part, _ in pixel_batches(chosen_source(options, chosen.rule), 32, 0)])

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
    table = markdown(found, about)
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text(table)
        content = {"about": about, "rows": [asdict(one) for one in found]}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
