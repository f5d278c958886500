"""Export a ViT with token merging: one verified and measured graph per policy and rate.

The reference model: python -m training.cli.export --run runs/reference --name reference
Your own:            python -m training.cli.export --architecture deit_small_patch16_224 --weights pretrained
                       --name deit-s --data /data/imagenet/val

With an embedding (that of the run or version, or --embedding), policy dtem is exported in addition to tome and none;
with --calibrations (or those of the version), the adaptive policies atm and adaptive-dtem.
An interrupted export resumes. A published version never changes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from training.cli.command import run_command
from training.cli.model_options import (
    add_model_options,
    calibrations,
    chosen_model,
    chosen_source,
    published_calibrations,
    rates,
)
from training.export.formats import FORMAT_NAMES, PRECISIONS
from training.export.needs import Needs
from training.export.parity import MIN_MARGIN, ParityError
from training.export.plan import Plan, check_plan, next_version
from training.export.publish import Published, publish
from training.models.variants import FLOAT32


def main(arguments: list[str] | None = None) -> int:
    return run_command("export", __doc__, _add_options, _export, arguments, refusals=(ParityError,))


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--name", required=True, help="name of the model, in the store and in requests")
    parser.add_argument("--version", help="a whole number; default: the next one")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--rates", type=rates, default=rates("0:16:2"), help="0,8,16 or first:last:step")
    parser.add_argument("--default-r", type=int, help="default: the rate above 0 nearest to 8")
    parser.add_argument("--default-policy", help="default: dtem where there is an embedding, else tome")
    parser.add_argument("--calibrations", type=calibrations, help="comma-separated files of training.cli.calibrate")
    parser.add_argument("--formats", default="onnx", help=f"comma-separated, of {', '.join(FORMAT_NAMES)}")
    parser.add_argument("--precisions", default=FLOAT32, help=f"comma-separated, of {', '.join(PRECISIONS)}")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a result from eager")


def _export(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    plan = Plan(
        name=options.name,
        version=options.version or next_version(options.store, options.name),
        rates=options.rates,
        default_r=options.default_r,
        default_policy=options.default_policy,
        formats=tuple(options.formats.split(",")),
        precisions=tuple(options.precisions.split(",")),
        parity_tolerance=options.tolerance,
    )
    check_plan(plan, options.store)
    chosen = chosen_model(options)
    plan = replace(
        plan,
        timm_name=chosen.timm_name,
        timm_arguments=chosen.timm_arguments,
        recipe=chosen.recipe,
        task=chosen.task.name,
    )
    source = chosen_source(options, chosen.rule)

    def on_start(needed: Needs) -> None:
        print(f"{needed}; unfinished work is in {plan.work(options.store)}", file=sys.stderr)

    published = publish(
        chosen.vit,
        chosen.rule,
        source,
        plan,
        options.store,
        chosen.embedding,
        options.calibrations if options.calibrations is not None else published_calibrations(options.published),
        options.published,
        on_start=on_start,
    )
    _report(published)


def _report(published: Published) -> None:
    default = published.default
    rate = "" if default["r"] is None else f", r {default['r']}"
    print(f"published {published.folder}; default: policy {default['policy']}{rate}")
    print("compared with eager: largest difference of a result and of a score, and images with near ties,")
    print("in which eager's own rounding leads to another decision")
    for name, found in published.parity.items():
        print(f"  {name:20} {found.difference:.1e} {found.noise:.1e}  {found.n_near_ties} of {found.n_images} images")
    if published.golden_margin < MIN_MARGIN:
        print(
            f"no image has clear decisions in all graphs: the golden image has a margin of "
            f"{published.golden_margin:.1e}, below {MIN_MARGIN:.0e}. A CPU that rounds otherwise may refuse the "
            "version; fewer --rates or more images make a clear one likelier"
        )


if __name__ == "__main__":
    sys.exit(main())
