"""Measure accuracy and GMACs of merging policies over rates: a table, a JSON file and a plot."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from training.cli.command import report
from training.cli.devices import chosen_device
from training.cli.model_options import (
    ChosenModel,
    chosen_model,
    chosen_source,
    published_calibrations,
    read_calibrations,
)
from training.cli.options import ModelOptions
from training.data.decoded import DecodedImages
from training.data.pixel_rule import describe
from training.data.sources import Source
from training.evaluate.progress import progress
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
from training.merging.policies import check_policies, supported_policies
from training.models.activations import images_at_once
from training.models.frozen import FrozenModule
from training.models.variants import variant_key
from training.models.weights import weights_digest
from training.tasks import frozen_calibration

_BATCH_SIZE = 50
"""At most, by default: fewer where the model is large."""


def run(model: ModelOptions, options: Namespace) -> int:
    device = chosen_device(options.device)
    chosen = chosen_model(model)
    for module in (chosen.vit, chosen.embedding):
        if module is not None:
            module.to(device)
    batch_size = options.batch_size or images_at_once(chosen.vit, _BATCH_SIZE)
    published = _published(model) if options.measured else None
    if published is not None:
        model = replace(model, n_images=published.about["n_images"], split=published.about["split"])
    source = chosen_source(model, chosen)
    about = published.about if published is not None else _about(model, options.device, batch_size, chosen, source)
    rows = finished_rows(options.out, about)
    rows += [row for row in published.rows if row.key not in {known.key for known in rows}] if published else []
    done = {row.key for row in rows}
    if options.calibrations:
        calibrations = read_calibrations(options.calibrations)
    else:
        calibrations = [] if published is not None else published_calibrations(model.published)
    keys = [adaptive_key(one.policy, one.metric, one.max_accuracy_drop) for one in calibrations]
    if len(set(keys)) < len(keys):
        raise ValueError(f"calibrations {', '.join(keys)}: expected each policy, metric and drop at most once")

    def frozen(policy: str, r: int) -> FrozenModule:
        return frozen_policy(chosen.task, policy, chosen.vit, chosen.rule, r, chosen.embedding).to(device)

    @cache
    def images() -> DecodedImages:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        return DecodedImages(source, options.out.parent, progress)

    def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
        return progress(images().batches(batch_size), title, -(-len(source) // batch_size))

    if published is None or options.policies:
        supported = supported_policies(has_embedding=chosen.embedding is not None)
        policies = chosen_policies(options.policies, chosen, default=",".join(policy.name for policy in supported))
        plan = [(policy, r) for policy, r in planned(policies, options.rates) if variant_key(policy, r) not in done]
        for row in evaluate(frozen, batches, plan):
            rows.append(row)
            write_evaluation(options.out, about, in_order(rows))
    for key, calibration in zip(keys, calibrations, strict=True):
        module = frozen_calibration(chosen.task, chosen.vit, chosen.rule, calibration, chosen.embedding).to(device)
        if key not in done:
            rows.append(evaluate_adaptive(calibration, module, batches))
            write_evaluation(options.out, about, in_order(rows))
    if not rows:
        asked = f"--policies {options.policies} at --rates {options.rates}"
        raise ValueError(f"nothing to measure: {asked}; pass other rates, --policies or --calibrations")
    write_evaluation(options.out, about, in_order(rows))
    _write_report(options, about, in_order(rows))
    return 0


def _published(model: ModelOptions) -> Evaluation:
    """Read the evaluation of a published version. Raises: ValueError without --published."""
    if not model.published:
        raise ValueError("--measured needs --published, a version in the store")
    return read_evaluation(model.published / "evaluation.json")


def _write_report(options: Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    table = markdown(rows, about)
    title = f"Accuracy and GMACs of {about['model']}"
    summary = "Accuracy and GMACs of each merging policy at each rate."
    with_suffix(options.out, ".md").write_text(report(title, summary, options.command_line, table))
    title = f"{about['model']}, {about['n_images']} images of {about['dataset']}"
    plot(rows, with_suffix(options.out, ".png"), title)
    print(table)


def chosen_policies(policies: str | None, chosen: ChosenModel, default: str) -> list[str]:
    """Split --policies, or the default.

    Raises: ValueError for an unknown policy, or a missing embedding.
    """
    names = (policies or default).split(",")
    check_policies(names, chosen.embedding)
    return names


def _about(model: ModelOptions, device: str, batch_size: int, chosen: ChosenModel, source: Source) -> dict[str, Any]:
    """Describe the evaluation. Digests identify weights, which change during a training run."""
    return {
        "model": str(model.published or model.run or model.architecture),
        "weights": weights_digest(chosen.vit),
        "embedding": weights_digest(chosen.embedding) if chosen.embedding else None,
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "batch_size": batch_size,
        "pixels": describe(chosen.rule),
        **({} if device == "cpu" else {"device": device}),
    }
