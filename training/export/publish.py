"""Publishing: graphs, proof, accuracy and manifest, made in a folder of its own and renamed into the store at the end.

The work folder lies beside the version under a name that starts with a dot; accuracies already measured there are kept,
so an export that was interrupted resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from training.data.preprocessing import InputRule
from training.data.sources import Source, pixel_batches
from training.evaluate.accuracy import measure
from training.export.onnx_format import OPSET, OnnxClassifier, export_onnx
from training.export.parity import MIN_MARGIN, ParityError, decisions, largest_difference, parity_pixels
from training.export.torchscript_format import TorchScriptClassifier, export_torchscript
from training.models.classifier import ServedClassifier, frozen_classifier
from training.models.macs import count_macs

WEIGHTS, GOLDEN, MANIFEST = "weights.safetensors", "golden.npz", "manifest.json"
N_GOLDEN = 4
_N_CANDIDATES = 512


@dataclass(frozen=True)
class Plan:
    """What to export: rates, formats, and what is promised of them. Units: tolerance in logits."""

    name: str
    version: str
    timm_name: str
    timm_arguments: dict[str, Any]
    recipe: str
    rates: tuple[int, ...]
    default_r: int
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


def publish(vit: nn.Module, rule: InputRule, source: Source, plan: Plan, store: Path) -> Published:
    """Export every rate, prove it, measure it, and rename the finished version into the store.

    Raises: ParityError past the tolerance; FileExistsError where the version is there already (versions are immutable);
        jsonschema.ValidationError where the manifest would not be one.
    """
    target = store / plan.name / plan.version
    if target.exists():
        raise FileExistsError(f"{target} exists, and versions are immutable: give another version")
    work = target.with_name(f".{plan.version}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in vit.state_dict().items()}, work / WEIGHTS)
    candidates = _first_pixels(source, _N_CANDIDATES)
    variants: list[dict[str, Any]] = []
    parity: dict[str, float] = {}
    golden: dict[str, np.ndarray] = {}
    golden_pixels = _golden_pixels(vit, rule, plan, candidates)
    for r in plan.rates:
        classifier = frozen_classifier(vit, rule, r)
        pixels = parity_pixels(classifier, candidates, 32)
        for name, exported in _graphs(classifier, r, pixels, plan.formats, work).items():
            parity[name] = largest_difference(classifier, exported, pixels)
            if parity[name] > plan.parity_tolerance:
                raise ParityError(f"{name}: differs from eager by {parity[name]:.2e} > {plan.parity_tolerance:.0e}")
            accuracy = _accuracy(exported, name, source, work)
            variants += [_variant(policy, r, name, classifier, rule, accuracy) for policy in _policies(r)]
        logits = classifier(golden_pixels).detach().numpy()
        golden |= {f"logits/{policy}-r{r}": logits for policy in _policies(r)}
    np.savez(work / GOLDEN, pixels=golden_pixels.numpy(), **golden)  # type: ignore[arg-type]
    (work / "accuracy.json").unlink(missing_ok=True)
    _write_manifest(_manifest(vit, rule, source, plan, variants, work), work, store)
    for path in work.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone; the service may be another user
    work.replace(target)
    return Published(target, parity)


def _policies(r: int) -> tuple[str, ...]:
    """At r = 0 no merging and merging are the same graph, under both names."""
    return ("none", "tome") if r == 0 else ("tome",)


def _first_pixels(source: Source, n_images: int) -> Tensor:
    return torch.stack([source[index][0] for index in range(min(n_images, len(source)))])


def _golden_pixels(vit: nn.Module, rule: InputRule, plan: Plan, candidates: Tensor) -> Tensor:
    """Pick the images that every rate decides most clearly: another host's rounding must not change a decision."""
    margins = [decisions(frozen_classifier(vit, rule, r), candidates).margin for r in plan.rates]
    clearest = torch.stack(margins).amin(0).topk(min(N_GOLDEN, len(candidates)))
    if float(clearest.values.min()) < MIN_MARGIN:
        raise ParityError(
            f"fewer than {N_GOLDEN} of {len(candidates)} images are decided by {MIN_MARGIN} at every rate"
        )
    return candidates[clearest.indices]


def _graphs(
    classifier: ServedClassifier, r: int, pixels: Tensor, formats: Sequence[str], work: Path
) -> dict[str, OnnxClassifier | TorchScriptClassifier]:
    stem = f"tome-r{r}" if r else "none-r0"
    graphs: dict[str, OnnxClassifier | TorchScriptClassifier] = {}
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
    key = f"{_sha256(work / name)} {_sha256(work / WEIGHTS)} {source.name} {source.split} {len(source)}"
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


def _variant(
    policy: str, r: int, file: str, classifier: ServedClassifier, rule: InputRule, accuracy: dict[str, Any]
) -> dict[str, Any]:
    is_onnx = file.endswith(".onnx")
    form = "onnx" if is_onnx else "torchscript"
    return {
        "id": f"{policy}-r{r}-float32-{form}",
        "policy": policy,
        "r": r,
        "precision": "float32",
        "format": form,
        "file": file,
        "requires": [WEIGHTS] if is_onnx else [],
        "opset": OPSET if is_onnx else None,
        "schedule": list(classifier.model.schedule),
        "tokens": list(classifier.model.tokens),
        "gmacs": count_macs(classifier.model, (rule.height, rule.width)) / 1e9,
        "data_dependent": False,
        "accuracy": accuracy,
    }


def _manifest(
    vit: nn.Module, rule: InputRule, source: Source, plan: Plan, variants: list[dict[str, Any]], work: Path
) -> dict[str, Any]:
    model: Any = vit
    files = sorted(path for path in work.iterdir() if path.name != MANIFEST)
    return {
        "schema_version": 1,
        "name": plan.name,
        "version": plan.version,
        "architecture": {
            "timm_name": plan.timm_name,
            "timm_arguments": plan.timm_arguments,
            "depth": len(model.blocks),
            "width": int(model.embed_dim),
            "n_tokens": int(model.patch_embed.num_patches + model.num_prefix_tokens),
            "n_protected": int(model.num_prefix_tokens),
        },
        "labels": list(source.labels),
        "training": {
            "dataset": source.name,
            "recipe": plan.recipe,
            "licence": source.licence,
            "credits": list(source.credits),
        },
        "git_commit": _git_commit(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "input": {"name": "pixels", "layout": "NHWC", "dtype": "uint8", "crop": "center", **asdict(rule)},
        "output": {"name": "logits", "dtype": "float32"},
        "files": {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files},
        "variants": variants,
        "golden": {"file": GOLDEN, "atol": plan.golden_tolerance},
        "default": {"policy": "tome", "r": plan.default_r},
    }


def _write_manifest(manifest: dict[str, Any], work: Path, store: Path) -> None:
    """Check against the store's schema and write, last of all files."""
    manifest = json.loads(json.dumps(manifest))  # tuples become lists, as the schema has them
    jsonschema.validate(manifest, json.loads((store / "manifest.schema.json").read_text()))
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_commit() -> str:
    root = Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def next_version(store: Path, name: str) -> str:
    """Return the version after the highest in the store."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
