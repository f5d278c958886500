"""Freeze a ViT with token merging into one graph per reduction rate, prove and measure each, and publish the version.

The reference model: `python -m training.cli.export --run runs/reference --name reference`
Your own:            `python -m training.cli.export --architecture deit_small_patch16_224 --weights pretrained
                      --name deit-s --data /data/imagenet/val`
With an embedding (the run's or version's own, or --embedding) policy dtem is exported beside tome and none, and with
--calibrations (or the version's own) those that adapt to the image: atm, adaptive-dtem.
An interrupted export resumes; a published version is never changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from training.cli.model_options import (
    add_model_options,
    calibrations,
    chosen_model,
    chosen_source,
    published_calibrations,
    rates,
)
from training.export.parity import ParityError
from training.export.publish import Plan, next_version, publish


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 published, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--name", required=True, help="the model's name in the store and in requests")
    parser.add_argument("--version", help="a whole number; default: the next one")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--rates", type=rates, default=rates("0:16:2"), help="0,8,16 or first:last:step")
    parser.add_argument("--default-r", type=int, default=8)
    parser.add_argument("--default-policy", help="default: dtem where there is an embedding, or tome")
    parser.add_argument("--calibrations", type=calibrations, help="files of training.cli.calibrate, with commas")
    parser.add_argument("--formats", default="onnx", help="onnx, torchscript, or both with a comma")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit from eager")
    options = parser.parse_args(arguments)
    try:
        _export(options)
    except (ValueError, OSError, ParityError) as err:
        print(f"export refused: {err}", file=sys.stderr)
        return 2
    return 0


def _export(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    chosen = chosen_model(options)
    plan = Plan(
        name=options.name,
        version=options.version or next_version(options.store, options.name),
        timm_name=chosen.timm_name,
        timm_arguments=chosen.timm_arguments,
        recipe=chosen.recipe,
        rates=options.rates,
        default_r=options.default_r,
        default_policy=options.default_policy,
        formats=tuple(options.formats.split(",")),
        parity_tolerance=options.tolerance,
    )
    source = chosen_source(options, chosen.rule)
    published = publish(
        chosen.vit,
        chosen.rule,
        source,
        plan,
        options.store,
        chosen.embedding,
        options.calibrations if options.calibrations is not None else published_calibrations(options.published),
        options.published,
    )
    print(f"published {published.folder}")
    print("largest difference of a logit from eager, at batch 1, 2 and 32:")
    for name, difference in published.parity.items():
        print(f"  {name:20} {difference:.1e}")


if __name__ == "__main__":
    sys.exit(main())
