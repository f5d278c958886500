"""Publishing: graphs, proof, accuracy and manifest, made in a folder of its own and renamed into the store at the end.

The work folder lies beside the version under a name that starts with a dot; accuracies already measured there are kept,
so an export that was interrupted resumes where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.data.preprocessing import InputRule
from training.data.sources import Source, pixel_batches
from training.evaluate.accuracy import Measurement, measure
from training.evaluate.results import Row, write_evaluation
from training.export.manifest import (
    EMBEDDING,
    EVALUATION,
    GOLDEN,
    WEIGHTS,
    accuracy_entry,
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
from training.export.parity import ParityError, decisions, golden_pixels, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.models.classifier import ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding
from training.models.macs import count_macs
from training.models.vit import MetricChoice
from training.models.weights import save_weights

N_GOLDEN = 4
BATCH_SIZE = 50
_N_CANDIDATES = 512
_N_FURTHER = 8192  # of a trained model 3 images in 100 were decided clearly at all of ToMe's rates
_N_PARITY = 32
_MEASURED = "measured.json"  # kept in the work folder alone, to resume
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
    evaluation = {f"{EVALUATION}.json", f"{EVALUATION}.npz"}
    _remove_others(work, {WEIGHTS, GOLDEN, *evaluation, *parity, *([EMBEDDING] if embedding is not None else [])})
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
    parity: dict[str, float] = {}
    variants: list[dict[str, Any]] = []
    rows: dict[str, Row] = {}
    classifiers = [frozen_classifier(vit, rule, graph.r, metric=graph.metric) for graph in graphs]
    candidates, *_ = _pixel_chunks(source, 0, _N_CANDIDATES)
    decided = [decisions(classifier, candidates) for classifier in classifiers]
    further = _pixel_chunks(source, _N_CANDIDATES, _N_FURTHER)
    golden = {"pixels": golden_pixels(classifiers, decided, candidates, further, N_GOLDEN)}
    for graph, classifier, found in zip(graphs, classifiers, decided, strict=True):
        pixels = parity_pixels(classifier, candidates, _N_PARITY, found)
        for name, exported in _exported(classifier, graph.stem, pixels, plan.formats, work).items():
            parity[name] = largest_difference(classifier, exported, pixels)
            if parity[name] > plan.parity_tolerance:
                raise ParityError(f"{name}: differs from eager by {parity[name]:.2e} > {plan.parity_tolerance:.0e}")
            gmacs = count_macs(classifier.model, (rule.height, rule.width)) / 1e9
            row = _measured(exported, graph, name, classifier.model.tokens[-1], gmacs, source, work)
            rows.setdefault(row.key, row)  # of several formats the first
            variants += variant_entries(graph.policies, name, classifier, row, accuracy_entry(row, source))
        logits = classifier(golden["pixels"]).detach()
        golden |= {f"logits/{policy}-r{graph.r}": logits for policy in graph.policies}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in golden.items()}
    np.savez(work / GOLDEN, **arrays)
    write_evaluation(work / EVALUATION, _about(plan, source), list(rows.values()))
    return parity, variants


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


def _measured(
    exported: Any, graph: _Graph, name: str, tokens_left: int, gmacs: float, source: Source, work: Path
) -> Row:
    """Measure a graph on the images, or take what this export's interrupted predecessor measured of the same bytes."""
    kept = work / _MEASURED
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{sha256(work / name)} {sha256(work / WEIGHTS)} {source.name} {source.split} {len(source)}"
    if key not in known:
        batches = tqdm(
            pixel_batches(source, BATCH_SIZE, 1), desc=name, total=-(-len(source) // BATCH_SIZE), unit="batch"
        )
        result = measure(exported, batches, n_parallel=os.cpu_count() or 1)
        known[key] = [np.packbits(result.is_right).tobytes().hex(), result.inference_seconds]
        kept.write_text(json.dumps(known))
    packed, seconds = known[key]
    is_right = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=len(source)).astype(bool)
    result = Measurement(is_right, seconds)
    return Row(
        policy=graph.policies[0],
        r=graph.r,
        tokens_left=tokens_left,
        gmacs=gmacs,
        top1=result.top1,
        ci95=result.ci95,
        n_images=len(is_right),
        images_per_second=result.images_per_second,
        is_right=is_right,
    )


def next_version(store: Path, name: str) -> str:
    """Return the version after the highest in the store."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
