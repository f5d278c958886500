"""Publishing: write, verify and measure all graphs in a work folder, then rename it into the store.

The work folder is next to the version, under a name that starts with a dot. It keeps finished
measurements, so an interrupted export resumes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data.decoded import DecodedImages
from training.data.preprocessing import InputRule
from training.data.sources import Source
from training.evaluate.progress import progress
from training.evaluate.results import Row, write_evaluation
from training.export.formats import GraphFormat, find_format
from training.export.manifest import (
    EMBEDDING,
    EVALUATION,
    GOLDEN,
    MANIFEST,
    WEIGHTS,
    accuracy_entry,
    architecture_entry,
    calibration_file,
    embedding_entry,
    exporter_entries,
    input_entry,
    output_entry,
    source_entries,
    variant_entries,
    write_manifest,
)
from training.export.measured import BATCH_SIZE, MEASURED, Graph, measured_row
from training.export.needs import Needs, needs
from training.export.parity import Golden, Parity, check_parity, golden_images, parity_pixels, rounding_spread, varied
from training.export.plan import Plan, check_plan
from training.merging.policies import UNMERGED, default_policy, supported_policies
from training.models.activations import BUDGET_BYTES
from training.models.calibration import Calibration
from training.models.embedding import DecoupledEmbedding
from training.models.variants import variant_key
from training.models.weights import save_weights
from training.tasks import find_task, frozen_calibration, graph_outputs
from training.tasks.task import Task, output_tensors

N_GOLDEN = 4
_SPREAD_FACTOR = 2
N_PARITY = 32
_N_CANDIDATES = 128
"""Of a trained model, 3 images in 100 have clear decisions at all of ToMe's rates."""
_GOLDEN_GMACS = 400
"""To look for golden images: about a minute on a CPU, however large the model."""


@dataclass(frozen=True)
class Published:
    """A version's folder, its default, and how closely each graph file follows eager.

    golden_margin: of the golden images' decisions. Below `MIN_MARGIN`, golden_tolerance is above the
        plan's, by what near ties change.
    """

    folder: Path
    parity: dict[str, Parity]
    default: dict[str, Any]
    golden_margin: float
    golden_tolerance: float


def publish(
    vit: nn.Module,
    rule: InputRule,
    source: Source,
    plan: Plan,
    store: Path,
    embedding: DecoupledEmbedding | None = None,
    calibrations: Sequence[Calibration] = (),
    predecessor: Path | None = None,
    on_start: Callable[[Needs], None] = lambda needs: None,
) -> Published:
    """Export, verify and measure all graphs, and move the version into the store.

    Where it fails or is interrupted, only finished measurements are kept, to resume from.
    on_start: called with what the export needs, once it is certain to begin.

    calibrations: at most one per adaptive policy. predecessor: a published version, whose
        measurements of identical files on the same images are reused.
    Raises: as `check_plan`; ParityError past the tolerance; CalibrationMismatch; ValueError where a
        rate is too large for the model, or the default is not among the graphs; OSError where the
        disk has too little space; jsonschema.ValidationError where the manifest does not match the
        schema.
    """
    check_plan(plan, store)
    task, graph_formats = find_task(plan.task), plan_formats(plan)
    graphs = _planned(task, vit, rule, plan.rates, embedding, calibrations)
    default = _checked_default(plan, graphs, embedding)
    needed = needs(vit, graphs, source, graph_formats)
    on_start(needed)
    _require_disk(store, needed)
    work = plan.work(store)
    try:
        work.mkdir(parents=True, exist_ok=True)
        save_weights(vit, embedding, work / WEIGHTS)
        if embedding is not None:
            embedding.save(work / EMBEDDING)
        for calibration in calibrations:
            calibration.save(work / calibration_file(calibration.policy))
        exported = _export_all(DecodedImages(source, work, progress), plan, graphs, work, predecessor)
        wanted = {WEIGHTS, GOLDEN, f"{EVALUATION}.json", f"{EVALUATION}.npz", *exported.parity}
        wanted |= {file for variant in exported.variants for file in variant["requires"]}
        wanted |= {calibration_file(calibration.policy) for calibration in calibrations}
        wanted |= {EMBEDDING} if embedding is not None else set()
        entries = {
            "name": plan.name,
            "version": plan.version,
            "architecture": architecture_entry(vit, plan.timm_name, plan.timm_arguments),
            **source_entries(source, plan.recipe),
            **exporter_entries(plan.git_commit, [work / name for name in wanted]),
            "input": input_entry(rule),
            "output": output_entry(task.outputs_of(is_adaptive=bool(calibrations)), plan.activation),
            "variants": exported.variants,
            "golden": {"file": GOLDEN, "atol": exported.golden_tolerance},
            "default": default,
            **embedding_entry(embedding),
        }
        write_manifest(entries, work, wanted, task=task.name)
    except BaseException:
        # Measurements took long and are small. The rest is made again in minutes, and is as large as
        # the model.
        _remove_others(work, {MEASURED})
        raise
    _remove_others(work, {MANIFEST, *wanted})
    for path in work.iterdir():
        # safetensors makes files readable by their owner only, but the service may run as another
        # user.
        path.chmod(0o644)
    work.replace(plan.target(store))
    golden = exported.golden
    return Published(plan.target(store), exported.parity, default, golden.margin, exported.golden_tolerance)


def _planned(
    task: Task,
    vit: nn.Module,
    rule: InputRule,
    rates: Sequence[int],
    embedding: DecoupledEmbedding | None,
    calibrations: Sequence[Calibration],
) -> list[Graph]:
    """List the graphs. At r = 0 all fixed policies share the unmerged graph."""
    merging = [policy for policy in supported_policies(has_embedding=embedding is not None) if policy is not UNMERGED]
    names = (UNMERGED.name, *(policy.name for policy in merging))
    unmerged = [Graph(names, 0, task.freeze(vit, rule, 0))] if 0 in rates else []
    fixed = [
        Graph((policy.name,), r, task.freeze(vit, rule, r, metric=policy.resolve_metric(embedding)))
        for policy in merging
        for r in rates
        if r
    ]
    policies = [calibration.policy for calibration in calibrations]
    if len(set(policies)) < len(policies):
        raise ValueError(f"calibrations of {', '.join(policies)}: expected one of each policy")
    adaptive = [
        Graph((one.policy,), None, frozen_calibration(task, vit, rule, one, embedding), one) for one in calibrations
    ]
    return unmerged + fixed + adaptive


def _checked_default(plan: Plan, graphs: Sequence[Graph], embedding: DecoupledEmbedding | None) -> dict[str, Any]:
    policy = plan.default_policy or default_policy(has_embedding=embedding is not None)
    offered = sorted({name for graph in graphs for name in graph.policies})
    if policy not in offered:
        raise ValueError(f"default_policy {policy}: expected one of {', '.join(offered)}")
    rates = [graph.r for graph in graphs if policy in graph.policies]
    if rates == [None]:
        return {"policy": policy, "r": None}
    return {"policy": policy, "r": plan.default_of([r for r in rates if r is not None])}


@dataclass(frozen=True)
class _Exported:
    parity: dict[str, Parity]
    variants: list[dict[str, Any]]
    golden: Golden
    golden_tolerance: float


def _export_all(
    images: DecodedImages, plan: Plan, graphs: Sequence[Graph], work: Path, predecessor: Path | None
) -> _Exported:
    """Write, verify and measure each graph, and write the golden file."""
    parity: dict[str, Parity] = {}
    variants: list[dict[str, Any]] = []
    rows: dict[str, Row] = {}
    golden = golden_images([graph.module for graph in graphs], _golden_chunks(images, graphs), N_GOLDEN)
    arrays, golden_tolerance = {"pixels": golden.pixels}, plan.golden_tolerance
    candidates = varied(images.pixels[:N_PARITY], N_PARITY)
    for graph in graphs:
        pixels = parity_pixels(graph.module, candidates, N_PARITY)
        for graph_format in plan_formats(plan):
            name = graph.key(graph_format.precision) + graph_format.suffix
            requires = graph_format.write(graph.module, pixels[:2], work / name, work / WEIGHTS)
            exported = graph_format.load(work / name)
            tolerance = graph_format.parity_tolerance or plan.parity_tolerance
            parity[name] = check_parity(graph.module, graph_format, work / name, exported, pixels, tolerance)
            measured = exported if plan.device == "cpu" else graph_format.load(work / name, device=plan.device)
            row, tokens, date = measured_row(
                measured, graph, graph_format, name, images, work, predecessor, plan.device
            )
            # Formats of one precision share a row, that of the first.
            rows.setdefault(row.key, row)
            accuracy = accuracy_entry(row, images, date)
            variants += variant_entries(graph.policies, name, requires, graph_format, row, tokens, accuracy)
            reference = graph.module if graph_format.parity_tolerance is None else exported
            arrays |= _golden_outputs(graph, graph_format.precision, reference, golden.pixels)
            if not golden.is_clear:
                # Another host may decide near ties otherwise, and is right.
                spread = rounding_spread(graph.module, exported, golden.pixels)
                golden_tolerance = max(golden_tolerance, _SPREAD_FACTOR * spread)
    written: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(work / GOLDEN, **written)
    write_evaluation(work / EVALUATION, _about(plan, images), list(rows.values()))
    return _Exported(parity, variants, golden, golden_tolerance)


def _golden_chunks(images: DecodedImages, graphs: Sequence[Graph]) -> Iterator[Tensor]:
    """Yield images, varied where there are few, up to a limit on the MACs to look at them.

    Shapes: uint8 (n, H, W, 3)
    """
    n_fitting = BUDGET_BYTES // (4 * images.pixels[0].numel())
    n_images = int(min(n_fitting, 16 * _N_CANDIDATES, max(N_PARITY, _GOLDEN_GMACS / graphs[0].module.gmacs())))
    yield from varied(images.pixels, n_images).split(_N_CANDIDATES)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _golden_outputs(
    graph: Graph, precision: str, reference: Callable[[Tensor], Any], pixels: Tensor
) -> dict[str, Tensor]:
    """Return the reference outputs by golden key, <output>/<variant key>, for every policy."""
    outputs = zip(graph_outputs(graph.module), output_tensors(reference(pixels)), strict=True)
    found = {output.name: tensor for output, tensor in outputs}
    return {
        f"{name}/{variant_key(policy, graph.r, precision)}": tensor
        for policy in graph.policies
        for name, tensor in found.items()
    }


def _about(plan: Plan, source: Source) -> dict[str, Any]:
    return {
        "model": f"{plan.name}/{plan.version}",
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "batch_size": BATCH_SIZE,
        "engine": plan.formats[0],
    }


def _remove_others(work: Path, wanted: set[str]) -> None:
    """Delete all other files, and the folder and its parent where they are then empty."""
    for path in work.iterdir() if work.is_dir() else ():
        if path.name not in wanted:
            path.unlink()
    for folder in (work, work.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def plan_formats(plan: Plan) -> list[GraphFormat]:
    """Return the formats in each precision.

    Raises: ValueError for a combination that does not exist, or does not run on the plan's device.
    """
    found = [find_format(name, precision) for precision in plan.precisions for name in plan.formats]
    for one in found:
        one.require(plan.device)
    return found


def _require_disk(store: Path, needed: Needs) -> None:
    folder = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed.disk_bytes:
        raise OSError(f"store {store}: {free / 1e9:.1f} GB free, {needed.disk_bytes / 1e9:.1f} GB needed")
