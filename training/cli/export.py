"""Export a ViT with token merging: one verified and measured graph per policy and rate."""

from __future__ import annotations

from argparse import Namespace

import torch

from training.cli.model_options import chosen_model, chosen_source, published_calibrations, read_calibrations
from training.cli.options import ModelOptions
from training.export.parity import ParityError
from training.export.publish import Plan, next_version, publish

REFUSALS = (ParityError,)


def run(model: ModelOptions, options: Namespace) -> int:
    torch.manual_seed(0)
    chosen = chosen_model(model)
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
        precisions=tuple(options.precisions.split(",")),
        parity_tolerance=options.tolerance,
        task=chosen.task.name,
    )
    source = chosen_source(model, chosen)
    published = publish(
        chosen.vit,
        chosen.rule,
        source,
        plan,
        options.store,
        chosen.embedding,
        read_calibrations(options.calibrations) if options.calibrations else published_calibrations(model.published),
        model.published,
    )
    print(f"published {published.folder}")
    print("largest difference of a result from eager, at batch sizes 1, 2 and 32:")
    for name, difference in published.parity.items():
        print(f"  {name:20} {difference:.1e}")
    return 0
