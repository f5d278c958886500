"""A store of one version with some of its variants: published as a version always is, by a rename, manifest last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Variant = dict[str, Any]
MANIFEST = "manifest.json"


def publish_part(published: Path, store: Path, keep: Callable[[Variant], bool], version: str | None = None) -> Path:
    """Publish the float32 ONNX variants to keep under <store>/<model>/<version>, and return that folder.

    version: another number than the original's.
    Raises: ValueError if no variant is to be kept.
    """
    manifest = reduce_manifest(json.loads((published / MANIFEST).read_text()), keep)
    manifest["version"] = version or manifest["version"]
    folder: Path = store / manifest["name"] / manifest["version"]
    unfinished = folder.parent / f".{folder.name}.partial"
    unfinished.mkdir(parents=True)
    for name in manifest["files"]:
        _link(published / name, unfinished / name)
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
    unfinished.replace(folder)
    return folder


def reduce_manifest(manifest: dict[str, Any], keep: Callable[[Variant], bool]) -> dict[str, Any]:
    """Leave variants out, with the files that only they need; the default stays if it is kept, else it is the first."""
    kept = [one for one in runnable(manifest) if keep(one)]
    if not kept:
        there = ", ".join(one["id"] for one in manifest["variants"])
        raise ValueError(f"{manifest['name']} {manifest['version']} has no such float32 ONNX variant, only {there}")
    needed = {name for one in kept for name in (one["file"], *one["requires"], one.get("calibration"))}
    needed |= {part["file"] for part in (manifest["golden"], manifest.get("embedding")) if part}
    keys = [{"policy": one["policy"], "r": one["r"]} for one in kept]
    return {
        **manifest,
        "variants": kept,
        "files": {name: digest for name, digest in manifest["files"].items() if name in needed},
        "default": manifest["default"] if manifest["default"] in keys else keys[0],
    }


def runnable(manifest: dict[str, Any]) -> list[Variant]:
    """List the variants that a service runs which was told nothing else."""
    return [one for one in manifest["variants"] if (one["format"], one["precision"]) == ("onnx", "float32")]


def rates_of(manifest: dict[str, Any], policy: str) -> list[int]:
    """Raises: ValueError where the policy is not there, or has no rates."""
    rates = sorted(one["r"] for one in runnable(manifest) if one["policy"] == policy and one["r"] is not None)
    if not rates:
        known = sorted({one["policy"] for one in runnable(manifest) if one["r"] is not None})
        raise ValueError(f"no policy {policy!r} with rates in {manifest['name']} {manifest['version']}, only {known}")
    return rates


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
