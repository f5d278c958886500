"""Export a ViT with token merging: one verified and measured graph per policy and rate."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

import torch

from training.cli.devices import chosen_device
from training.cli.model_options import chosen_model, chosen_source, published_calibrations, read_calibrations
from training.cli.options import ModelOptions
from training.cli.plan import plan_of
from training.export.needs import Needs
from training.export.parity import MIN_MARGIN, ParityError
from training.export.publish import N_PARITY, Published, plan_formats, publish

REFUSALS = (ParityError,)


def run(model: ModelOptions, options: Namespace) -> int:
    torch.manual_seed(0)
    plan = plan_of(options)
    # Refused before a model is loaded.
    chosen_device(plan.device)
    plan_formats(plan)
    given = read_calibrations(options.calibrations) if options.calibrations else None
    chosen = chosen_model(model)
    plan = replace(
        plan,
        timm_name=chosen.timm_name,
        timm_arguments=chosen.timm_arguments,
        recipe=chosen.recipe,
        task=chosen.task.name,
        activation=chosen.activation,
    )

    source = chosen_source(model, chosen)

    def on_start(needed: Needs) -> None:
        if len(source) < N_PARITY:
            print(f"parity: the {len(source)} images, and the same mirrored, shifted and with noise", file=sys.stderr)
        print(f"{needed}; unfinished work is in {plan.work(options.store)}", file=sys.stderr)

    published = publish(
        chosen.vit,
        chosen.rule,
        source,
        plan,
        options.store,
        chosen.embedding,
        given if given is not None else published_calibrations(model.published),
        model.published,
        on_start=on_start,
    )
    _report(published)
    return 0


def _report(published: Published) -> None:
    default = published.default
    rate = "" if default["r"] is None else f", r {default['r']}"
    print(f"published {published.folder}; default: policy {default['policy']}{rate}")
    print("largest difference of a result and of a score from eager, and images with near ties,")
    print("in which the rounding of eager leads to another decision than that of the graph:")
    for name, found in published.parity.items():
        print(f"  {name:20} {found.difference:.1e} {found.noise:.1e}  {found.n_near_ties} of {found.n_images} images")
    if published.golden_margin < MIN_MARGIN:
        print(
            f"no image has clear decisions in all graphs: the golden image has a margin of "
            f"{published.golden_margin:.1e}, below {MIN_MARGIN:.0e}. So hosts compare it within "
            f"{published.golden_tolerance:.1e}, by what near ties change; fewer --rates or more images make a clear "
            "image likelier"
        )
