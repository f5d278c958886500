"""Measure accuracy and GMACs of merging policies over rates: a table, a JSON file and a plot.

A published model:  python -m training.cli.evaluate --published model_store/reference/5 --out docs/results/policies
A training run:     python -m training.cli.evaluate --run runs/reference-dtem --rates 8,16
                      --out runs/reference-dtem/policies
Any timm ViT:       python -m training.cli.evaluate --architecture deit_small_patch16_224 --weights pretrained
                      --data /data/imagenet/val --out runs/deit-s

Rows already in <out>.json are kept, so an interrupted evaluation resumes.
--calibrations runs/atm.json,runs/adaptive-dtem.json adds rows of adaptive policies, with thresholds that
`training.cli.calibrate` found.
--published VERSION --measured reports what the export measured on the exported graphs. With --policies or
--calibrations it also measures, in PyTorch on the same images, the rows that are missing.
<out>.npz records the scores of each row, image by image, for `python -m training.cli.compare`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from training.cli.command import report, run_command
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
    evaluate,
    evaluate_adaptive,
    frozen_policy,
    in_order,
    markdown,
    planned,
    plot,
)
from training.merging.policies import FIXED_POLICIES, check_policies, supported_policies
from training.models.frozen import FrozenModule
from training.models.variants import variant_key
from training.models.weights import weights_digest
from training.tasks import frozen_calibration


def main(arguments: list[str] | None = None) -> int:
    return run_command("evaluation", __doc__, _add_options, _evaluate, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--rates", type=rates, default=rates("0:16:2"), help="0,8,16 or first:last:step")
    supported = ", ".join(policy.name for policy in supported_policies(has_embedding=True))
    parser.add_argument(
        "--policies",
        help=f"comma-separated, of {', '.join(FIXED_POLICIES)}; default: those of {supported} that the model supports",
    )
    parser.add_argument("--measured", action="store_true", help="start from what the export of --published measured")
    parser.add_argument("--calibrations", type=calibrations, help="comma-separated files of training.cli.calibrate")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="writes <out>.json, <out>.npz, <out>.md and <out>.png")


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
    if len(set(keys)) < len(keys):
        raise ValueError(f"calibrations {', '.join(keys)}: expected each policy, metric and drop at most once")

    def frozen(policy: str, r: int) -> FrozenModule:
        return frozen_policy(chosen.task, policy, chosen.vit, chosen.rule, r, chosen.embedding)

    def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
        n_batches = -(-len(source) // options.batch_size)
        return tqdm(pixel_batches(source, options.batch_size, n_workers=1), desc=title, total=n_batches, unit="batch")

    if published is None or options.policies:
        supported = supported_policies(has_embedding=chosen.embedding is not None)
        policies = chosen_policies(options, chosen, default=",".join(policy.name for policy in supported))
        plan = [(policy, r) for policy, r in planned(policies, options.rates) if variant_key(policy, r) not in done]
        for row in evaluate(frozen, batches, plan):
            rows.append(row)
            write_evaluation(options.out, about, in_order(rows))
    for key, calibration in zip(keys, calibrations, strict=True):
        module = frozen_calibration(chosen.task, chosen.vit, chosen.rule, calibration, chosen.embedding)
        if key not in done:
            rows.append(evaluate_adaptive(calibration, module, batches))
            write_evaluation(options.out, about, in_order(rows))
    if not rows:
        asked = f"--policies {options.policies} at --rates {options.rates}"
        raise ValueError(f"nothing to measure: {asked}; pass other rates, --policies or --calibrations")
    write_evaluation(options.out, about, in_order(rows))
    _write_report(options, about, in_order(rows))


def _published(options: argparse.Namespace) -> Evaluation:
    """Read the evaluation of a published version. Raises: ValueError without --published."""
    if not options.published:
        raise ValueError("--measured needs --published, a version in the store")
    return read_evaluation(options.published / "evaluation.json")


def _write_report(options: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    table = markdown(rows, about)
    title = f"Accuracy and GMACs of {about['model']}"
    summary = "Accuracy and GMACs of each merging policy at each rate."
    with_suffix(options.out, ".md").write_text(report(title, summary, options.command_line, table))
    title = f"{about['model']}, {about['n_images']} images of {about['dataset']}"
    plot(rows, with_suffix(options.out, ".png"), title)
    print(table)


def chosen_policies(options: argparse.Namespace, chosen: ChosenModel, default: str) -> list[str]:
    """Return the policies of --policies.

    Raises: ValueError for an unknown policy, or a missing embedding.
    """
    policies = (options.policies or default).split(",")
    check_policies(policies, chosen.embedding)
    return policies


def _about(options: argparse.Namespace, chosen: ChosenModel, source: Source) -> dict[str, Any]:
    """Describe the evaluation. Digests identify weights, which change during a training run."""
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
