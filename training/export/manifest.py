"""The manifest of a version: its entries, and writing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
from torch import nn

from training.data.preprocessing import InputRule
from training.data.sources import Source
from training.evaluate.results import Row, value_entry
from training.export.formats import GraphFormat
from training.export.onnx_format import MIN_ONNXRUNTIME
from training.export.plan import manifest_schema
from training.models.activations import n_tokens
from training.models.classifier import SOFTMAX
from training.models.embedding import DecoupledEmbedding
from training.models.variants import variant_id
from training.provenance import git_commit, package_version
from training.tasks.task import Output

WEIGHTS, EMBEDDING = "weights.safetensors", "embedding.safetensors"
EVALUATION = "evaluation"
"""Stem of the evaluation's files in a version, for paired comparison."""
GOLDEN, MANIFEST = "golden.npz", "manifest.json"


PROMISE = (
    "Batch-invariant: results do not depend on the other images in the batch, up to floating-point rounding. The batch "
    "is padded, and absent tokens are masked."
)


def calibration_file(policy: str) -> str:
    return f"{policy}.json"


def variant_entries(
    policies: Sequence[str],
    file: str,
    requires: Sequence[str],
    graph_format: GraphFormat,
    row: Row,
    tokens: Sequence[float],
    accuracy: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return the entries of one graph file, one for each policy that shares it.

    requires: other files that the graph needs. tokens: per block and at the end; means for adaptive
        policies.
    """
    counts = [round(count) for count in tokens]
    entry = {
        "r": row.r,
        "precision": graph_format.precision,
        "format": graph_format.name,
        "file": file,
        "requires": list(requires),
        "opset": graph_format.opset,
        "schedule": [before - after for before, after in pairwise(counts)],
        "tokens": counts,
        "gmacs": row.gmacs,
        "data_dependent": row.r is None,
        "accuracy": accuracy,
    }
    if row.r is None:
        spread = {"p5": row.gmacs_p5, "p95": row.gmacs_p95}
        entry |= {"gmacs_spread": spread, "calibration": calibration_file(row.policy), "promise": PROMISE}
    return [
        {"id": variant_id(policy, row.r, graph_format.precision, graph_format.name), "policy": policy, **entry}
        for policy in policies
    ]


def accuracy_entry(row: Row, source: Source, date: str) -> dict[str, Any]:
    return {
        **value_entry(row.measure, row.value),
        "dataset": source.name,
        "split": source.split,
        "n_images": row.n_images,
        "ci95": list(row.ci95),
        "date": date,
    }


def architecture_entry(vit: nn.Module, timm_name: str, timm_arguments: dict[str, Any]) -> dict[str, Any]:
    model: Any = vit
    return {
        "timm_name": timm_name,
        "timm_arguments": timm_arguments,
        "depth": len(model.blocks),
        "width": int(model.embed_dim),
        "n_tokens": n_tokens(vit),
        "n_protected": int(model.num_prefix_tokens),
    }


def source_entries(source: Source, recipe: str) -> dict[str, Any]:
    training = {"dataset": source.name, "recipe": recipe, "licence": source.licence, "credits": list(source.credits)}
    return {"labels": list(source.labels), "training": training}


def input_entry(rule: InputRule) -> dict[str, Any]:
    stated = {key: value for key, value in asdict(rule).items() if value is not None}
    return {"name": "pixels", "layout": "NHWC", "dtype": "uint8", **stated}


def output_entry(outputs: Sequence[Output], activation: str = SOFTMAX) -> dict[str, Any]:
    """Return the manifest's `output`: names by role, the dtype of the result, and an activation but softmax."""
    result, *others = outputs
    entry = {result.role: result.name, "dtype": result.dtype, **{output.role: output.name for output in others}}
    return entry if activation == SOFTMAX else {**entry, "activation": activation}


def embedding_entry(embedding: DecoupledEmbedding | None) -> dict[str, Any]:
    """Return the manifest's `embedding`; nothing without one."""
    if embedding is None:
        return {}
    config = embedding.config
    return {"embedding": {"file": EMBEDDING, "dim": config.dim, "r": config.r, "recipe": config.recipe}}


def write_manifest(entries: dict[str, Any], folder: Path, names: Iterable[str], *, task: str) -> None:
    """Add these files of the folder, the time and the task to the manifest, validate it and write it.

    Raises: jsonschema.ValidationError where the manifest does not match the schema.
    """
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in sorted(names)}
    entries = {"schema_version": 1, **entries, "task": task, "created": created, "files": files}
    # A round trip through JSON turns tuples into lists, which the schema expects.
    manifest = json.loads(json.dumps(entries))
    jsonschema.validate(manifest, manifest_schema())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exporter_entries(commit: str | None, files: Iterable[Path]) -> dict[str, Any]:
    """Return what exported the version, and the least ONNX Runtime that reads its graphs.

    commit: None asks git.
    """
    has_onnx = any(file.suffix == ".onnx" for file in files)
    return {
        "git_commit": commit or git_commit(),
        "exporter": f"dtem-serve {package_version('dtem-serve') or 'of unknown version'}",
        "min_onnxruntime": MIN_ONNXRUNTIME if has_onnx else None,
    }
