"""Publishing: write, verify and measure all graphs in a work folder, then rename it into the store.

The work folder is next to the version, under a name that starts with a dot. It keeps finished
measurements, so an interrupted export resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.data.sources import Source
from training.evaluate.results import Row, write_evaluation
from training.export.formats import GraphFormat, find_format
from training.export.manifest import (
    EMBEDDING,
    EVALUATION,
    GOLDEN,
    WEIGHTS,
    accuracy_entry,
    architecture_entry,
    calibration_file,
    embedding_entry,
    git_commit,
    input_entry,
    output_entry,
    source_entries,
    variant_entries,
    write_manifest,
)
from training.export.measured import BATCH_SIZE, Graph, measured_row
from training.export.parity import ParityError, decisions, golden_pixels, largest_difference, parity_pixels
from training.merging.policies import UNMERGED, default_policy, supported_policies
from training.models.calibration import Calibration
from training.models.classifier import CLASSIFY
from training.models.embedding import DecoupledEmbedding
from training.models.variants import FLOAT32, variant_key
from training.models.weights import save_weights
from training.tasks import find_task, frozen_calibration, graph_outputs
from training.tasks.task import Task, output_tensors

N_GOLDEN = 4
_N_CANDIDATES = 512
_N_FURTHER = 8192
"""Of a trained model, 3 images in 100 have clear decisions at all of ToMe's rates."""
_N_PARITY = 32


@dataclass(frozen=True)
class Plan:
    """The name, rates, formats and tolerances of an export. Units: tolerances in logits

    task: a name in `TASKS`. default_policy: None means dtem where there is an embedding, else tome.
    git_commit: of the code that exports; None asks git.
    """

    name: str
    version: str
    timm_name: str
    timm_arguments: dict[str, Any]
    recipe: str
    rates: tuple[int, ...]
    default_r: int
    default_policy: str | None = None
    formats: tuple[str, ...] = ("onnx",)
    precisions: tuple[str, ...] = (FLOAT32,)
    parity_tolerance: float = 1e-4
    golden_tolerance: float = 1e-3
    git_commit: str | None = None
    task: str = CLASSIFY

    def __post_init__(self) -> None:
        if self.default_r not in self.rates:
            raise ValueError(f"default_r {self.default_r}: expected one of the rates {list(self.rates)}")
        if len(set(self.rates)) != len(self.rates) or min(self.rates) < 0:
            raise ValueError(f"rates {list(self.rates)}: expected distinct numbers of at least 0")
        _ = self.graph_formats, find_task(self.task)

    @property
    def graph_formats(self) -> list[GraphFormat]:
        """The formats in each precision.

        Raises: ValueError for a combination that does not exist.
        """
        return [find_format(name, precision) for precision in self.precisions for name in self.formats]


@dataclass(frozen=True)
class Published:
    """The folder of a version, and the largest difference from eager of each graph file."""

    folder: Path
    parity: dict[str, float]


def publish(
    vit: nn.Module,
    rule: InputRule,
    source: Source,
    plan: Plan,
    store: Path,
    embedding: DecoupledEmbedding | None = None,
    calibrations: Sequence[Calibration] = (),
    predecessor: Path | None = None,
) -> Published:
    """Export, verify and measure all graphs, and move the version into the store.

    calibrations: at most one per adaptive policy. predecessor: a published version, whose
        measurements of identical files on the same images are reused.
    Raises: ParityError past the tolerance; FileExistsError where the version exists (versions are
        immutable); CalibrationMismatch; ValueError where the default is not among the graphs, or
        outside a git checkout; jsonschema.ValidationError where the manifest does not match the
        schema.
    """
    task = find_task(plan.task)
    graphs = _planned(task, vit, rule, plan.rates, embedding, calibrations)
    default = _checked_default(plan, graphs, embedding)
    commit = plan.git_commit or git_commit()
    target = store / plan.name / plan.version
    if target.exists():
        raise FileExistsError(f"{target} exists, and versions are immutable: choose another version")
    work = target.with_name(f".{plan.version}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    save_weights(vit, embedding, work / WEIGHTS)
    if embedding is not None:
        embedding.save(work / EMBEDDING)
    for calibration in calibrations:
        calibration.save(work / calibration_file(calibration.policy))
    parity, variants = _export_all(source, plan, graphs, work, predecessor)
    wanted = {WEIGHTS, GOLDEN, f"{EVALUATION}.json", f"{EVALUATION}.npz", *parity}
    wanted |= {file for variant in variants for file in variant["requires"]}
    wanted |= {calibration_file(calibration.policy) for calibration in calibrations}
    _remove_others(work, wanted | ({EMBEDDING} if embedding is not None else set()))
    entries = {
        "name": plan.name,
        "version": plan.version,
        "architecture": architecture_entry(vit, plan.timm_name, plan.timm_arguments),
        **source_entries(source, plan.recipe),
        "git_commit": commit,
        "input": input_entry(rule),
        "output": output_entry(task.outputs_of(is_adaptive=bool(calibrations))),
        "variants": variants,
        "golden": {"file": GOLDEN, "atol": plan.golden_tolerance},
        "default": default,
        **embedding_entry(embedding),
    }
    write_manifest(entries, work, store / "manifest.schema.json", task=task.name)
    for path in work.iterdir():
        # safetensors makes files readable by their owner only, but the service may run as another
        # user.
        path.chmod(0o644)
    work.replace(target)
    return Published(target, parity)


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
    if plan.default_r not in rates:
        raise ValueError(f"default_r {plan.default_r}: expected one of {rates}, the rates of policy {policy}")
    return {"policy": policy, "r": plan.default_r}


def _export_all(
    source: Source, plan: Plan, graphs: Sequence[Graph], work: Path, predecessor: Path | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Write, verify and measure each graph, and write the golden file.

    Return the differences from eager by file, and the manifest's variants.
    """
    parity: dict[str, float] = {}
    variants: list[dict[str, Any]] = []
    rows: dict[str, Row] = {}
    modules = [graph.module for graph in graphs]
    candidates, *_ = _pixel_chunks(source, 0, _N_CANDIDATES)
    decided = [decisions(module, candidates) for module in modules]
    further = _pixel_chunks(source, _N_CANDIDATES, _N_FURTHER)
    golden = {"pixels": golden_pixels(modules, decided, candidates, further, N_GOLDEN)}
    for graph, found in zip(graphs, decided, strict=True):
        pixels = parity_pixels(graph.module, candidates, _N_PARITY, found)
        for graph_format in plan.graph_formats:
            name = graph.key(graph_format.precision) + graph_format.suffix
            requires = graph_format.write(graph.module, pixels[:2], work / name, work / WEIGHTS)
            exported = graph_format.load(work / name)
            parity[name] = largest_difference(graph.module, exported, pixels)
            tolerance = graph_format.parity_tolerance or plan.parity_tolerance
            if parity[name] > tolerance:
                raise ParityError(f"{name}: differs from eager by {parity[name]:.2e} > {tolerance:.0e}")
            row, tokens, date = measured_row(exported, graph, graph_format, name, source, work, predecessor)
            # Formats of one precision share a row, that of the first.
            rows.setdefault(row.key, row)
            accuracy = accuracy_entry(row, source, date)
            variants += variant_entries(graph.policies, name, requires, graph_format, row, tokens, accuracy)
            reference = graph.module if graph_format.parity_tolerance is None else exported
            golden |= _golden_outputs(graph, graph_format.precision, reference, golden["pixels"])
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in golden.items()}
    np.savez(work / GOLDEN, **arrays)
    write_evaluation(work / EVALUATION, _about(plan, source), list(rows.values()))
    return parity, variants


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
    """Delete notes for resuming, and graphs of an earlier, different plan."""
    for path in work.iterdir():
        if path.name not in wanted:
            path.unlink()


def _pixel_chunks(source: Source, first: int, last: int) -> Iterator[Tensor]:
    """Yield the images from first to last, or to the end of the source.

    Shapes: uint8 (n, H, W, 3)
    """
    for begin in range(first, min(last, len(source)), _N_CANDIDATES):
        end = min(begin + _N_CANDIDATES, last, len(source))
        yield torch.stack([source[index][0] for index in range(begin, end)])


def next_version(store: Path, name: str) -> str:
    """Return the number of the next version."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
