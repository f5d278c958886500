"""The manifest as this half writes it: what a version is, and every file of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
from torch import nn

from training.data.preprocessing import InputRule
from training.data.sources import Source
from training.evaluate.results import Row
from training.export.onnx_format import OPSET
from training.models.embedding import DecoupledEmbedding

WEIGHTS, EMBEDDING = "weights.safetensors", "embedding.safetensors"
EVALUATION = "evaluation"  # .json and .npz: which images each graph got right, for paired comparison
GOLDEN, MANIFEST = "golden.npz", "manifest.json"


PROMISE = (
    "An image keeps the tokens that it would keep alone, and gets the same answer but for rounding, whoever shares its "
    "batch: the batch is padded, and absent tokens are masked."
)


def variant_key(policy: str, r: int | None) -> str:
    """Return how a variant is called in file names and in the golden file."""
    return policy if r is None else f"{policy}-r{r}"


def calibration_file(policy: str) -> str:
    return f"{policy}.json"


def variant_entries(
    policies: Sequence[str], file: str, row: Row, tokens: Sequence[float], accuracy: dict[str, Any]
) -> list[dict[str, Any]]:
    """Describe one graph file under the name of every policy that it serves.

    tokens: entering each block and left at the end, means where they depend on the image.
    """
    is_onnx = file.endswith(".onnx")
    form = "onnx" if is_onnx else "torchscript"
    counts = [round(count) for count in tokens]
    entry = {
        "r": row.r,
        "precision": "float32",
        "format": form,
        "file": file,
        "requires": [WEIGHTS] if is_onnx else [],
        "opset": OPSET if is_onnx else None,
        "schedule": [before - after for before, after in pairwise(counts)],
        "tokens": counts,
        "gmacs": row.gmacs,
        "data_dependent": row.r is None,
        "accuracy": accuracy,
    }
    if row.r is None:
        spread = {"p5": row.gmacs_p5, "p95": row.gmacs_p95}
        entry |= {"gmacs_spread": spread, "calibration": calibration_file(row.policy), "promise": PROMISE}
    return [{"id": f"{variant_key(policy, row.r)}-float32-{form}", "policy": policy, **entry} for policy in policies]


def accuracy_entry(row: Row, source: Source, date: str) -> dict[str, Any]:
    return {
        "top1": row.top1,
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
        "n_tokens": int(model.patch_embed.num_patches + model.num_prefix_tokens),
        "n_protected": int(model.num_prefix_tokens),
    }


def source_entries(source: Source, recipe: str) -> dict[str, Any]:
    training = {"dataset": source.name, "recipe": recipe, "licence": source.licence, "credits": list(source.credits)}
    return {"labels": list(source.labels), "training": training}


def input_entry(rule: InputRule) -> dict[str, Any]:
    return {"name": "pixels", "layout": "NHWC", "dtype": "uint8", "crop": "center", **asdict(rule)}


def output_entry(*, is_adaptive: bool) -> dict[str, Any]:
    """Describe the outputs; those of adaptive graphs only where there are any, so that other manifests stay as ever."""
    return {"name": "logits", "dtype": "float32", **({"tokens": "tokens", "gmacs": "gmacs"} if is_adaptive else {})}


def embedding_entry(embedding: DecoupledEmbedding | None) -> dict[str, Any]:
    """Describe the embedding; nothing where there is none, so that such a manifest stays as it always was."""
    if embedding is None:
        return {}
    config = embedding.config
    return {"embedding": {"file": EMBEDDING, "dim": config.dim, "r": config.r, "recipe": config.recipe}}


def file_entries(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}


def write_manifest(entries: dict[str, Any], folder: Path, schema: Path) -> None:
    """Complete the manifest with the folder's files and the time, check it and write it.

    Raises: jsonschema.ValidationError where it is not what the schema wants.
    """
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entries = {"schema_version": 1, **entries, "created": created, "files": file_entries(folder)}
    manifest = json.loads(json.dumps(entries))  # tuples become lists, as the schema has them
    jsonschema.validate(manifest, json.loads(schema.read_text()))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit that exports. Raises: ValueError outside a git checkout."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as err:
        raise ValueError(
            f"{folder} is in no git checkout with a commit (or there is no git), and a manifest names the commit that "
            "exported it: export from a clone of the repository"
        ) from err
