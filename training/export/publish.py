"""Publishing: graphs, proof, accuracy and manifest, made in a folder of its own and renamed into the store at the end.

The work folder lies beside the version under a name that starts with a dot; accuracies already measured there are kept,
so an export that was interrupted resumes where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.data.preprocessing import InputRule
from training.data.sources import Source, pixel_batches
from training.evaluate.accuracy import measure
from training.export.manifest import (
    EMBEDDING,
    GOLDEN,
    WEIGHTS,
    architecture_entry,
    embedding_entry,
    git_commit,
    input_entry,
    sha256,
    source_entries,
    variant_entries,
    write_manifest,
)
from training.export.onnx_format import OnnxClassifier, export_onnx
from training.export.parity import MIN_MARGIN, Decisions, ParityError, decisions, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.models.classifier import ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding
from training.models.vit import MetricChoice
from training.models.weights import save_weights

N_GOLDEN = 4
_N_CANDIDATES = 2048  # of which four must be decided clearly by every graph of every policy
_N_PARITY = 32
_Exported = OnnxClassifier | TorchScriptClassifier


@dataclass(frozen=True)
class Plan:
    """What to export: rates, formats, and what is promised of them. Units: tolerance in logits.

    default_policy: dtem where there is an embedding, or tome where it is None.
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


@dataclass(frozen=True)
class _Graph:
    """One graph to make: the policies that it serves, at one rate, and what it compares tokens by."""

    policies: tuple[str, ...]
    r: int
    metric: MetricChoice

    @property
    def stem(self) -> str:
        return f"{self.policies[0]}-r{self.r}"


def publish(
    vit: nn.Module,
    rule: InputRule,
    source: Source,
    plan: Plan,
    store: Path,
    embedding: DecoupledEmbedding | None = None,
) -> Published:
    """Export every rate of every policy, prove it, measure it, and rename the finished version into the store.

    Raises: ParityError past the tolerance; FileExistsError where the version is there already (versions are immutable);
        ValueError where the plan's default is none of its graphs, or outside a git checkout;
        jsonschema.ValidationError where the manifest would not be one.
    """
    graphs = _planned(plan.rates, embedding)
    default = _checked_default(plan, graphs, embedding)
    commit = git_commit()
    target = store / plan.name / plan.version
    if target.exists():
        raise FileExistsError(f"{target} exists, and versions are immutable: give another version")
    work = target.with_name(f".{plan.version}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    save_weights(vit, embedding, work / WEIGHTS)
    if embedding is not None:
        embedding.save(work / EMBEDDING)
    parity, variants = _export_all(vit, rule, source, plan, graphs, work)
    _remove_others(work, {WEIGHTS, GOLDEN, *parity, *([EMBEDDING] if embedding is not None else [])})
    entries = {
        "name": plan.name,
        "version": plan.version,
        "architecture": architecture_entry(vit, plan.timm_name, plan.timm_arguments),
        **source_entries(source, plan.recipe),
        "git_commit": commit,
        "input": input_entry(rule),
        "output": {"name": "logits", "dtype": "float32"},
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


def _planned(rates: Sequence[int], embedding: DecoupledEmbedding | None) -> list[_Graph]:
    """List the graphs. At r = 0 no merging and merging are the same graph, under every policy's name."""
    metrics: dict[str, MetricChoice] = {"tome": "keys"}
    if embedding is not None:
        metrics["dtem"] = embedding
    unmerged = [_Graph(("none", *metrics), 0, "keys")] if 0 in rates else []
    return unmerged + [_Graph((policy,), r, metric) for policy, metric in metrics.items() for r in rates if r]


def _checked_default(plan: Plan, graphs: Sequence[_Graph], embedding: DecoupledEmbedding | None) -> dict[str, Any]:
    policy = plan.default_policy or ("tome" if embedding is None else "dtem")
    offered = sorted({name for graph in graphs for name in graph.policies})
    if policy not in offered:
        raise ValueError(f"default_policy {policy}: expected one of {', '.join(offered)}")
    rates = [graph.r for graph in graphs if policy in graph.policies]
    if plan.default_r not in rates:
        raise ValueError(f"default_r {plan.default_r}: expected one of {rates}, the rates of policy {policy}")
    return {"policy": policy, "r": plan.default_r}


def _export_all(
    vit: nn.Module, rule: InputRule, source: Source, plan: Plan, graphs: Sequence[_Graph], work: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Write, prove and measure each graph, and write the golden file; return differences by file, and the variants."""

    def freeze(graph: _Graph) -> ServedClassifier:
        return frozen_classifier(vit, rule, graph.r, metric=graph.metric)

    parity: dict[str, float] = {}
    variants: list[dict[str, Any]] = []
    candidates = _first_pixels(source, _N_CANDIDATES)
    decided = [decisions(freeze(graph), candidates) for graph in graphs]
    golden = {"pixels": _golden_pixels(decided, candidates)}
    for graph, found in zip(graphs, decided, strict=True):
        classifier = freeze(graph)
        pixels = parity_pixels(classifier, candidates, _N_PARITY, found)
        for name, exported in _exported(classifier, graph.stem, pixels, plan.formats, work).items():
            parity[name] = largest_difference(classifier, exported, pixels)
            if parity[name] > plan.parity_tolerance:
                raise ParityError(f"{name}: differs from eager by {parity[name]:.2e} > {plan.parity_tolerance:.0e}")
            accuracy = _accuracy(exported, name, source, work)
            variants += variant_entries(graph.policies, graph.r, name, classifier, rule, accuracy)
        logits = classifier(golden["pixels"]).detach()
        golden |= {f"logits/{policy}-r{graph.r}": logits for policy in graph.policies}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in golden.items()}
    np.savez(work / GOLDEN, **arrays)
    return parity, variants


def _remove_others(work: Path, wanted: set[str]) -> None:
    """Drop what is no part of the version: notes for resuming, and graphs of an earlier attempt that planned others."""
    for path in work.iterdir():
        if path.name not in wanted:
            path.unlink()


def _first_pixels(source: Source, n_images: int) -> Tensor:
    return torch.stack([source[index][0] for index in range(min(n_images, len(source)))])


def _golden_pixels(decided: Sequence[Decisions], candidates: Tensor) -> Tensor:
    """Pick the images that every graph decides most clearly: another host's rounding must not change a decision."""
    margins = torch.stack([found.margin for found in decided]).amin(0)
    clearest = margins.topk(min(N_GOLDEN, len(candidates)))
    if float(clearest.values.min()) < MIN_MARGIN:
        raise ParityError(
            f"fewer than {N_GOLDEN} of {len(candidates)} images are decided by {MIN_MARGIN} at every rate"
        )
    return candidates[clearest.indices]


def _exported(
    classifier: ServedClassifier, stem: str, pixels: Tensor, formats: Sequence[str], work: Path
) -> dict[str, _Exported]:
    graphs: dict[str, _Exported] = {}
    if "onnx" in formats:
        export_onnx(classifier, pixels[:2], work / f"{stem}.onnx", work / WEIGHTS)
        graphs[f"{stem}.onnx"] = OnnxClassifier(work / f"{stem}.onnx")
    if "torchscript" in formats:
        export_torchscript(classifier, pixels[:2], work / f"{stem}.pt")
        graphs[f"{stem}.pt"] = TorchScriptClassifier(work / f"{stem}.pt")
    return graphs


def _accuracy(exported: Any, name: str, source: Source, work: Path) -> dict[str, Any]:
    """Measure top-1 of a graph, or take it from this export's interrupted predecessor."""
    kept = work / "accuracy.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{sha256(work / name)} {sha256(work / WEIGHTS)} {source.name} {source.split} {len(source)}"
    if key not in known:
        batches = tqdm(pixel_batches(source, 50, 1), desc=name, total=-(-len(source) // 50), unit="batch")
        result = measure(exported, batches, n_parallel=os.cpu_count() or 1)
        known[key] = {
            "top1": result.top1,
            "dataset": source.name,
            "split": source.split,
            "n_images": len(source),
            "ci95": list(result.ci95),
            "date": datetime.now(UTC).date().isoformat(),
        }
        kept.write_text(json.dumps(known))
    accuracy: dict[str, Any] = known[key]
    return accuracy


def next_version(store: Path, name: str) -> str:
    """Return the version after the highest in the store."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
