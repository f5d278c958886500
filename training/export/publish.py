"""Publishing: graphs, proof, accuracy and manifest, made in a folder of its own and renamed into the store at the end.

The work folder lies beside the version under a name that starts with a dot; accuracies already measured there are kept,
so an export that was interrupted resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.data.sources import Source
from training.evaluate.results import Row, write_evaluation
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
    variant_key,
    write_manifest,
)
from training.export.measured import BATCH_SIZE, Graph, measured_row
from training.export.onnx_format import OUTPUTS, OnnxClassifier, export_onnx
from training.export.parity import ParityError, decisions, golden_pixels, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.models.calibration import Calibration
from training.models.classifier import AdaptiveClassifier, FrozenClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding
from training.models.vit import MetricChoice
from training.models.weights import save_weights

N_GOLDEN = 4
_N_CANDIDATES = 512
_N_FURTHER = 8192  # of a trained model 3 images in 100 were decided clearly at all of ToMe's rates
_N_PARITY = 32
_Exported = OnnxClassifier | TorchScriptClassifier


@dataclass(frozen=True)
class Plan:
    """What to export: rates, formats, and what is promised of them. Units: tolerance in logits.

    default_policy: dtem where there is an embedding, or tome where it is None.
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
    parity_tolerance: float = 1e-4
    golden_tolerance: float = 1e-3
    git_commit: str | None = None

    def __post_init__(self) -> None:
        if self.default_r not in self.rates:
            raise ValueError(f"default_r {self.default_r}: expected one of the rates {list(self.rates)}")
        if len(set(self.rates)) != len(self.rates) or min(self.rates) < 0:
            raise ValueError(f"rates {list(self.rates)}: expected different numbers, none negative")
        if unknown := set(self.formats) - {"onnx", "torchscript"}:
            raise ValueError(f"formats {sorted(unknown)}: expected onnx, torchscript")


@dataclass(frozen=True)
class Published:
    """Where the version lies, and the largest difference from eager of each graph file."""

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
    """Export every rate of every policy, prove it, measure it, and rename the finished version into the store.

    calibrations: one for each policy that adapts to the image. predecessor: a published version; what was measured of
    the same bytes on the same images is taken from it.
    Raises: ParityError past the tolerance; FileExistsError where the version is there already (versions are immutable);
        CalibrationMismatch; ValueError where the plan's default is none of its graphs, or outside a git checkout;
        jsonschema.ValidationError where the manifest would not be one.
    """
    graphs = _planned(vit, rule, plan.rates, embedding, calibrations)
    default = _checked_default(plan, graphs, embedding)
    commit = plan.git_commit or git_commit()
    target = store / plan.name / plan.version
    if target.exists():
        raise FileExistsError(f"{target} exists, and versions are immutable: give another version")
    work = target.with_name(f".{plan.version}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    save_weights(vit, embedding, work / WEIGHTS)
    if embedding is not None:
        embedding.save(work / EMBEDDING)
    for calibration in calibrations:
        calibration.save(work / calibration_file(calibration.policy))
    parity, variants = _export_all(rule, source, plan, graphs, work, predecessor)
    wanted = {WEIGHTS, GOLDEN, f"{EVALUATION}.json", f"{EVALUATION}.npz", *parity}
    wanted |= {calibration_file(calibration.policy) for calibration in calibrations}
    _remove_others(work, wanted | ({EMBEDDING} if embedding is not None else set()))
    entries = {
        "name": plan.name,
        "version": plan.version,
        "architecture": architecture_entry(vit, plan.timm_name, plan.timm_arguments),
        **source_entries(source, plan.recipe),
        "git_commit": commit,
        "input": input_entry(rule),
        "output": output_entry(is_adaptive=bool(calibrations)),
        "variants": variants,
        "golden": {"file": GOLDEN, "atol": plan.golden_tolerance},
        "default": default,
        **embedding_entry(embedding),
    }
    write_manifest(entries, work, store / "manifest.schema.json")
    for path in work.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone; the service may be another user
    work.replace(target)
    return Published(target, parity)


def _planned(
    vit: nn.Module,
    rule: InputRule,
    rates: Sequence[int],
    embedding: DecoupledEmbedding | None,
    calibrations: Sequence[Calibration],
) -> list[Graph]:
    """List the graphs. At r = 0 no merging and merging are the same graph, under every policy's name."""
    metrics: dict[str, MetricChoice] = {"tome": "keys"}
    if embedding is not None:
        metrics["dtem"] = embedding
    unmerged = [Graph(("none", *metrics), 0, frozen_classifier(vit, rule, 0))] if 0 in rates else []
    fixed = [
        Graph((policy,), r, frozen_classifier(vit, rule, r, metric=metric))
        for policy, metric in metrics.items()
        for r in rates
        if r
    ]
    policies = [calibration.policy for calibration in calibrations]
    if len(set(policies)) < len(policies):
        raise ValueError(f"calibrations of {', '.join(policies)}: expected one of each policy")
    adaptive = [
        Graph(
            (calibration.policy,),
            None,
            AdaptiveClassifier(calibration.model(vit, embedding), rule).eval(),
            calibration,
        )
        for calibration in calibrations
    ]
    return unmerged + fixed + adaptive


def _checked_default(plan: Plan, graphs: Sequence[Graph], embedding: DecoupledEmbedding | None) -> dict[str, Any]:
    policy = plan.default_policy or ("tome" if embedding is None else "dtem")
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
    rule: InputRule, source: Source, plan: Plan, graphs: Sequence[Graph], work: Path, predecessor: Path | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Write, prove and measure each graph, and write the golden file; return differences by file, and the variants."""
    parity: dict[str, float] = {}
    variants: list[dict[str, Any]] = []
    rows: dict[str, Row] = {}
    classifiers = [graph.classifier for graph in graphs]
    candidates, *_ = _pixel_chunks(source, 0, _N_CANDIDATES)
    decided = [decisions(classifier, candidates) for classifier in classifiers]
    further = _pixel_chunks(source, _N_CANDIDATES, _N_FURTHER)
    golden = {"pixels": golden_pixels(classifiers, decided, candidates, further, N_GOLDEN)}
    for graph, found in zip(graphs, decided, strict=True):
        pixels = parity_pixels(graph.classifier, candidates, _N_PARITY, found)
        for name, exported in _exported(graph.classifier, graph.stem, pixels, plan.formats, work).items():
            parity[name] = largest_difference(graph.classifier, exported, pixels)
            if parity[name] > plan.parity_tolerance:
                raise ParityError(f"{name}: differs from eager by {parity[name]:.2e} > {plan.parity_tolerance:.0e}")
            row, tokens, date = measured_row(exported, graph, name, rule, source, work, predecessor)
            rows.setdefault(row.key, row)  # of several formats the first
            variants += variant_entries(graph.policies, name, row, tokens, accuracy_entry(row, source, date))
        golden |= _golden_outputs(graph, golden["pixels"])
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in golden.items()}
    np.savez(work / GOLDEN, **arrays)
    write_evaluation(work / EVALUATION, _about(plan, source), list(rows.values()))
    return parity, variants


@torch.no_grad()
def _golden_outputs(graph: Graph, pixels: Tensor) -> dict[str, Tensor]:
    answer = graph.classifier(pixels)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return {
        f"{name}/{variant_key(policy, graph.r)}": output
        for policy in graph.policies
        for name, output in zip(OUTPUTS, outputs, strict=False)
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
    """Drop what is no part of the version: notes for resuming, and graphs of an earlier attempt that planned others."""
    for path in work.iterdir():
        if path.name not in wanted:
            path.unlink()


def _pixel_chunks(source: Source, first: int, last: int) -> Iterator[Tensor]:
    """Yield the images from first to last, as far as there are any. Shapes: uint8 (n, H, W, 3)"""
    for begin in range(first, min(last, len(source)), _N_CANDIDATES):
        end = min(begin + _N_CANDIDATES, last, len(source))
        yield torch.stack([source[index][0] for index in range(begin, end)])


def _exported(
    classifier: FrozenClassifier, stem: str, pixels: Tensor, formats: Sequence[str], work: Path
) -> dict[str, _Exported]:
    graphs: dict[str, _Exported] = {}
    if "onnx" in formats:
        export_onnx(classifier, pixels[:2], work / f"{stem}.onnx", work / WEIGHTS)
        graphs[f"{stem}.onnx"] = OnnxClassifier(work / f"{stem}.onnx")
    if "torchscript" in formats:
        export_torchscript(classifier, pixels[:2], work / f"{stem}.pt")
        graphs[f"{stem}.pt"] = TorchScriptClassifier(work / f"{stem}.pt")
    return graphs


def next_version(store: Path, name: str) -> str:
    """Return the version after the highest in the store."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
