"""Measure top-1 and GMACs of merging policies over rates: a table, a JSON file and a picture.

`python -m training.cli.evaluate --published model_store/reference/4 --out docs/results/policies`
`python -m training.cli.evaluate --run runs/reference-dtem --rates 8,16 --out runs/reference-dtem/policies`
`python -m training.cli.evaluate --architecture deit_small_patch16_224 --weights pretrained --data /data/imagenet/val
 --out runs/deit-s` does the same for any timm ViT. Rows already in the JSON file of --out are kept, so it resumes.
`--calibrations runs/atm.json,runs/adaptive-dtem.json` adds rows of policies that adapt to the image, by thresholds that
`training.cli.calibrate` found.
`--published model_store/reference/4 --measured --out docs/results/policies` lays out what was measured when it was exported, on
its very graphs; with --policies or --calibrations it measures in PyTorch what that lacks, on the same images.
Which images each row got right is kept in <out>.npz, for `python -m training.cli.compare`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from training.cli.model_options import (
    ChosenModel,
    add_model_options,
    calibrations,
    chosen_model,
    chosen_source,
    published_calibrations,
    rates,
)
from training.data.sources import Source, pixel_batches
from training.evaluate.results import (
    Evaluation,
    Row,
    adaptive_key,
    finished_rows,
    read_evaluation,
    with_suffix,
    write_evaluation,
)
from training.evaluate.table import (
    POLICIES,
    check_policies,
    evaluate,
    evaluate_adaptive,
    in_order,
    markdown,
    planned,
    plot,
    policy_classifier,
)
from training.models.classifier import AdaptiveClassifier, ServedClassifier
from training.models.weights import weights_digest


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 measured, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rates", type=rates, default=rates("0:16:2"), help="0,8,16 or first:last:step")
    parser.add_argument("--policies", help=f"some of {', '.join(POLICIES)}, with commas (default: none, tome and dtem)")
    parser.add_argument(
        "--measured", action="store_true", help="begin with what the export of --published measured, on its very graphs"
    )
    parser.add_argument("--calibrations", type=calibrations, help="files of training.cli.calibrate, with commas")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="files <out>.json, <out>.npz, <out>.md and <out>.png")
    options = parser.parse_args(arguments)
    try:
        _evaluate(options)
    except (ValueError, OSError) as err:
        print(f"evaluation refused: {err}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    chosen = chosen_model(options)
    published = _published(options) if options.measured else None
    if published is not None:
        options.n_images = published.about["n_images"]
        options.split = published.about["split"]
    source = chosen_source(options, chosen.rule)
    about = published.about if published is not None else _about(options, chosen, source)
    rows = finished_rows(options.out, about)
    rows += [row for row in published.rows if row.key not in {known.key for known in rows}] if published else []
    done = {row.key for row in rows}
    calibrations = options.calibrations
    if calibrations is None:
        calibrations = [] if published is not None else published_calibrations(options.published)
    keys = [adaptive_key(one.policy, one.metric, one.max_accuracy_drop) for one in calibrations]
    if len(set(keys)) < len(keys):  # an evaluation knows its rows by their keys
        raise ValueError(f"calibrations {', '.join(keys)}: expected no two of one policy, metric and drop")

    def classifiers(policy: str, r: int) -> ServedClassifier:
        return policy_classifier(policy, chosen.vit, chosen.rule, r, chosen.embedding)

    def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
        n_batches = -(-len(source) // options.batch_size)
        return tqdm(pixel_batches(source, options.batch_size, n_workers=1), desc=title, total=n_batches, unit="batch")

    if published is None or options.policies:
        policies = chosen_policies(options, chosen, default="none,tome,dtem" if chosen.embedding else "none,tome")
        plan = [(policy, r) for policy, r in planned(policies, options.rates) if f"{policy}-r{r}" not in done]
        for row in evaluate(classifiers, chosen.rule, batches, plan):
            rows.append(row)
            write_evaluation(options.out, about, in_order(rows))
    for key, calibration in zip(keys, calibrations, strict=True):
        classifier = AdaptiveClassifier(calibration.model(chosen.vit, chosen.embedding), chosen.rule).eval()
        if key not in done:
            rows.append(evaluate_adaptive(calibration, classifier, batches))
            write_evaluation(options.out, about, in_order(rows))
    if not rows:
        raise ValueError(f"policies {options.policies} at rates {options.rates}: nothing to measure")
    write_evaluation(options.out, about, in_order(rows))
    _lay_out(options.out, about, in_order(rows))


def _published(options: argparse.Namespace) -> Evaluation:
    """Read what the export of a version measured. Raises: ValueError without a version."""
    if not options.published:
        raise ValueError("--measured needs --published, a version in the store")
    return read_evaluation(options.published / "evaluation.json")


def _lay_out(out: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    table = markdown(rows, about)
    with_suffix(out, ".md").write_text(table)
    plot(rows, with_suffix(out, ".png"), f"{about['model']}, {about['n_images']} images of {about['dataset']}")
    print(table)


def chosen_policies(options: argparse.Namespace, chosen: ChosenModel, default: str) -> list[str]:
    """Return the policies asked for. Raises: ValueError where one is unknown, or dtem without an embedding."""
    policies = (options.policies or default).split(",")
    check_policies(policies, chosen.embedding)
    return policies


def _about(options: argparse.Namespace, chosen: ChosenModel, source: Source) -> dict[str, Any]:
    """Say what is evaluated. Weights and embedding by their digest: a run's change while it learns."""
    return {
        "model": str(options.published or options.run or options.architecture),
        "weights": weights_digest(chosen.vit),
        "embedding": weights_digest(chosen.embedding) if chosen.embedding else None,
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "batch_size": options.batch_size,
    }


if __name__ == "__main__":
    sys.exit(main())
